"""`python -m dpo_score` is `dpo-score`."""

from dpo_score.cli.main import main

main()
