"""Tests of the plans that ship."""
