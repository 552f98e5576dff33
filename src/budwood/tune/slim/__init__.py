"""SLIM as a PEFT tuner.

To read first, after :mod:`budwood.tune.equations`: ``layer`` applies the equations to the tokens of
a pass, and ``model`` puts such layers into a model. The rest, by subject:

- layers: ``passes``, ``autograd``, ``compiled`` (for ``torch.compile``), ``one_token`` (for
  generation on a CPU), ``fused_experts`` (of mixture-of-experts models), ``adapter_names`` (an
  adapter for each row of a batch);
- statistics: ``distance`` of a token from the training data, the ``clustering`` that moves with it,
  ``state`` that a layer remembers, what it has measured ``latest``, ``fitting`` of the discriminant
  before training;
- what the layers of a model share: the ``keeper`` of optimiser steps, the ``token_watch`` on
  padding and labels, and ``trainer_labels`` of the Trainer around;
- where layers go: ``targets`` in a model, ``architectures`` by their names, and the ``sources``
  that tell where they would do nothing;
- use: ``observe`` the routing, ``export`` to LoRA.
"""
