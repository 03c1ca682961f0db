"""Lightning with ``holdfast.integrations.lightning``."""

import lightning.pytorch as pl
from digits import NUM_EPOCHS, begin, end
from lightning_module import DigitsModule

import holdfast
from holdfast.integrations.lightning import Exact

arguments = begin()
holdfast.run("peers", "lightning", seed=arguments.seed, settings={"checkpoint.every_steps": 10})
module = DigitsModule(arguments.workers)
trainer = pl.Trainer(
    max_epochs=NUM_EPOCHS,
    callbacks=[Exact()],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    accelerator="cpu",
)
trainer.fit(module)
end(module)
