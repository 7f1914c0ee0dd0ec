"""The former address of `dpo_score.integrations`, kept for programs that were written against it."""
