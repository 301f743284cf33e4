"""The gate and the kernels under other trainers, one file each, named after what it serves.

- ``hugging_face``: a ``Trainer`` that trains on the samples, or the tokens, that a gate keeps;
- ``lightning``: a ``LightningModule`` whose training step is given the rows that a gate keeps;
- ``trl``: the log-probabilities and entropies of TRL's trainers from one read of the logits.

None of these packages is needed by anything else here, and nothing is replaced by an import.
"""
