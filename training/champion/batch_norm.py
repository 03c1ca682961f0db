"""Statistics of batch norm for averaged weights, recomputed on training data.

As ``torch.optim.swa_utils.update_bn``: the mean, over batches, of each batch's mean and variance.
Otherwise than there, only batch norm is in training mode, so dropout is off, as it will be when the
statistics are used, and nothing is drawn; and the batches are those of the first training epoch,
the same for every process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.training.data.batch_plan import BatchPlan
from holdfast.training.data.loader import Loader
from holdfast.training.exactness.seeding import derive_seed, preserved_generators, seed_generators
from holdfast.training.experiment.model_call import BY_POSITION, CallForm
from holdfast.training.experiment.protocol import input_names, model_inputs
from holdfast.training.loop.evaluation import evaluation_mode, model_device, move
from holdfast.training.loop.segment import batch_plan
from holdfast.training.stage import Stage


def recompute_batch_norm(
    model: nn.Module, batches: Iterable[tuple[Tensor, ...]], form: CallForm = BY_POSITION
) -> dict[str, Tensor]:
    """New running statistics, by their names in the state dict; the model gets them, too.

    Args:
        model: with the weights that the statistics are for. Modes of its modules are put back.
        batches: inputs of the model, flat.
        form: how the model takes them.
    """
    modules = _batch_norms(model)
    momenta = [module.momentum for module in modules.values()]
    with preserved_generators(), evaluation_mode(model), torch.no_grad():
        seed_generators(derive_seed(0, "batch norm"))
        for module in modules.values():
            module.reset_running_stats()
            module.momentum = None  # a cumulative mean
            module.train()
        try:
            for inputs in batches:
                form.call(model, move(inputs, model_device(model)))
        finally:
            for module, momentum in zip(modules.values(), momenta, strict=True):
                module.momentum = momentum
    return {
        f"{prefix}{name}": buffer.detach().cpu()
        for prefix, module in modules.items()
        for name, buffer in module.named_buffers(recurse=False)
    }


def training_batches(stage: Stage) -> Iterator[tuple[Tensor, ...]]:
    """Inputs of the first training epoch, at most ``selection.batch_norm_steps`` steps of it."""
    config, dataset = stage.config, stage.experiment.dataset("train")
    plan: BatchPlan = batch_plan(dataset, config, stage.seed("order"))
    num_steps = min(config.selection.batch_norm_steps, plan.num_steps(0))
    loader = Loader(
        dataset,
        plan,
        num_microbatches=config.train.num_microbatches,
        seed=stage.seed("order"),
    )
    names = input_names(stage.experiment)
    for microbatch in loader.steps(0, 0):
        if microbatch.epoch > 0 or microbatch.step_in_epoch >= num_steps:
            return
        yield model_inputs(microbatch.batch, names)


def _batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Batch norm modules with running statistics, by what their buffers' names begin with."""
    return {
        f"{name}." if name else "": module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
