"""A small GPT on characters, with a training loop as people write it."""

import argparse
import math
import os

import torch
from torch import nn
from torch.nn.functional import cross_entropy

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--rate", type=float, default=3e-3)
parser.add_argument("--context", type=int, default=32)
parser.add_argument("--batch", type=int, default=16)
config = parser.parse_args()
torch.manual_seed(1337)

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
first_step = 0
if os.path.exists("checkpoint.pt"):
    saved = torch.load("checkpoint.pt")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    first_step = saved["step"]

for step in range(first_step, config.steps):
    loss = loss_of(model, crops(train_tokens, config.batch))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    if step % 100 == 99:
        validation_loss = evaluate(model)
        print(f"step {step + 1}: loss {loss.item():.4f}, validation {validation_loss:.4f}")
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        saved["scheduler"] = scheduler.state_dict()
        torch.save({**saved, "step": step + 1}, "checkpoint.pt")
