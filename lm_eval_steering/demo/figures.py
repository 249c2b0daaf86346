"""What the demo measures."""

from __future__ import annotations

from dataclasses import dataclass, field

FACTORS = (2.0, 4.0, 6.0, 8.0, 12.0)


@dataclass
class Figures:
    """Everything that the demo measures. Languages are codes, shares are 0 to 1, perplexity is nats a token.

    Attributes:
        languages: steered ones, which are the evaluated ones too.
        neurons: neurons of each language.
        baseline_nats: evaluated language -> nats of the unsteered model.
        deactivated_nats: deactivated -> evaluated -> nats.
        deactivated_control_nats: deactivated -> one mapping (evaluated -> nats) a matched random set.
        amplified_nats: steered -> factor -> evaluated -> nats.
        lfs_choose: steered -> factor -> share of outputs, on the prompts that the factor is chosen on.
        chosen: steered -> chosen factor.
        lfs: steered -> {"baseline", "steered"} -> share of outputs, on other prompts.
        lfs_control: steered -> share for each matched random set.
        lfs_open: steered -> the same from an open start.
        lfs_open_control: steered -> share from an open start for each matched random set.
        lss: steered -> base -> LSS at the chosen factor.
        lss_control: steered -> base -> LSS of each matched random set.
        outputs: steered -> (prompt, output before, output after).
    """

    languages: tuple[str, ...]
    factors: tuple[float, ...] = FACTORS
    neurons: dict[str, int] = field(default_factory=dict)
    baseline_nats: dict[str, float] = field(default_factory=dict)
    deactivated_nats: dict[str, dict[str, float]] = field(default_factory=dict)
    deactivated_control_nats: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    amplified_nats: dict[str, dict[float, dict[str, float]]] = field(default_factory=dict)
    lfs_choose: dict[str, dict[float, float]] = field(default_factory=dict)
    chosen: dict[str, float] = field(default_factory=dict)
    lfs: dict[str, dict[str, float]] = field(default_factory=dict)
    lfs_control: dict[str, list[float]] = field(default_factory=dict)
    lfs_open: dict[str, dict[str, float]] = field(default_factory=dict)
    lfs_open_control: dict[str, list[float]] = field(default_factory=dict)
    lss: dict[str, dict[str, float]] = field(default_factory=dict)
    lss_control: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    outputs: dict[str, tuple[str, str, str]] = field(default_factory=dict)
