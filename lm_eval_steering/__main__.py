"""`python -m lm_eval_steering` is `lm-eval-steering`; `accelerate launch -m lm_eval_steering` needs it."""

from lm_eval_steering.cli import main

if __name__ == "__main__":
    main()
