"""The same GPT and the same loop, in the hands of Holdfast."""

import argparse
import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import holdfast

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--rate", type=float, default=3e-3)
parser.add_argument("--context", type=int, default=32)
parser.add_argument("--batch", type=int, default=16)
config = parser.parse_args()
run = holdfast.run("gpt", "first", seed=1337, config=config)

text = "the quick brown fox jumps over the lazy dog; pack my box with five dozen jugs. " * 40
letters = sorted(set(text))
tokens = torch.tensor([letters.index(letter) for letter in text])
train_tokens, validation_tokens = tokens[:-400], tokens[-400:]


class Gpt(nn.Module):
    def __init__(self, width=64, heads=4, layers=2):
        super().__init__()
        self.embed = nn.Embedding(len(letters), width)
        self.place = nn.Parameter(0.02 * torch.randn(config.context, width))
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.1, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, len(letters))

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        hidden = self.embed(ids) + self.place[: ids.shape[1]]
        return self.head(self.blocks(hidden, mask=mask, is_causal=True))


def crops(source, count):
    starts = torch.randint(len(source) - config.context - 1, (count,))
    rows = torch.stack([source[start : start + config.context + 1] for start in starts])
    return rows[:, :-1], rows[:, 1:]


def loss_of(model, batch):
    inputs, targets = batch
    return cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model):
    model.eval()
    loss = loss_of(model, crops(validation_tokens, 64)).item()
    model.train()
    return loss


model = Gpt()
optimizer = torch.optim.AdamW(model.parameters(), lr=config.rate)
scheduler = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / config.steps))
)
run.keep(model=model, optimizer=optimizer, scheduler=scheduler)

for step in run.steps(config.steps):
    loss = loss_of(model, crops(train_tokens, config.batch))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    run.log(loss=loss)
    if step % 100 == 99:
        validation_loss = evaluate(model)
        print(f"step {step + 1}: loss {loss.item():.4f}, validation {validation_loss:.4f}")
        run.validated(loss=validation_loss)
