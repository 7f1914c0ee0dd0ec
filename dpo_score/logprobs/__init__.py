"""Token ids to log-probabilities with a loaded model: `scorer.PairScorer` is the way in, `self_check` decides the path.

Token sequences (`data.types`) and a model (`models`) come in; values per token, or the reason there are none, go out.
Reads and writes no file and knows no run: imports nothing of results, engine, export or the command line.
"""
