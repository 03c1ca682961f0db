"""Lightning with its own checkpoints, and with those that it writes when SIGTERM raises."""

from pathlib import Path

import lightning.pytorch as pl
from digits import NUM_EPOCHS, SAVE_EVERY_STEPS, begin, end
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_module import DigitsModule

arguments = begin()
pl.seed_everything(arguments.seed, workers=True)
module = DigitsModule(arguments.workers)
saving = ModelCheckpoint(
    "out",
    every_n_train_steps=SAVE_EVERY_STEPS,
    save_last=True,
    save_on_exception=True,
)
trainer = pl.Trainer(
    max_epochs=NUM_EPOCHS,
    callbacks=[saving],
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    accelerator="cpu",
)
saved = sorted(Path("out").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
trainer.fit(module, ckpt_path=saved[-1] if saved else None)
if trainer.received_sigterm:
    raise SystemExit(143)
end(module)
