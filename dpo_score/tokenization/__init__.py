"""From a preference pair to token ids and the mask of scored tokens.

In: `Pair` records (dpo_score.data), a tokenizer and the text settings. Out: `EncodedPair` records, or a `Rejected` for
a row that cannot become tokens. Imports no model code: which limits a model has is given from outside.
"""
