"""The gate and the kernels under other trainers, one file per host.

- ``hugging_face``: a ``Trainer`` that trains on the samples, or the tokens, that a gate keeps;
- ``hugging_face_pruning``: a ``Trainer`` that leaves out well-learned samples without bias;
- ``lightning``: a ``LightningModule`` whose training step receives the samples that a gate keeps;
- ``transformers_loss``: the loss of a Transformers language model over selected tokens;
- ``trl``: the log-probabilities and entropies of TRL's trainers, without the tokens that need none;
- ``verl``, ``openrlhf``, ``torchtitan``, ``swift``: a switch each, ``head``, for their log-probabilities and entropies;
- ``eaft``: switches for axolotl's and LLaMA-Factory's entropy-weighted loss, by the exact entropy;
- ``mmseg``: a switch for its sampler of hard pixels.

Nothing else here needs these packages, and importing a file changes nothing in its host.
"""
