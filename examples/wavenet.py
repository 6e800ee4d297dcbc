"""WaveNet on a WAV file: learn its sound, and go on from its beginning (van den Oord et al. 2016, arXiv:1609.03499).

    python examples/wavenet.py --sound music.wav --out continued.wav

Without --sound, it makes a sound of its own to learn: a melody of plucked strings. The file that it writes begins with
a part of the sound and goes on with what the model draws, sample by sample, at the cost of one pass.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from pygen.autoregressive import WaveNet, WaveNetConfig
from pygen.autoregressive.audio import compress, expand, read_wav, write_wav

NOTES = (220.0, 277.2, 329.6, 440.0, 329.6, 277.2)


def melody(seconds: float, rate: int) -> Tensor:
    """Plucked strings, four notes a second: decaying sums of five harmonics, (samples,) in [-1, 1]."""
    every = rate // 4
    time_in_note = torch.arange(every) / rate
    count = math.ceil(seconds * 4)
    notes = []
    for number in range(count):
        pitch = NOTES[number % len(NOTES)]
        tones = [
            torch.sin(2 * math.pi * k * pitch * time_in_note) / k * (-6 * k * time_in_note).exp() for k in range(1, 6)
        ]
        notes.append(sum(tones))
    sound = torch.cat(notes)[: round(seconds * rate)]
    return 0.8 * sound / sound.abs().max()


def train(model: WaveNet, sound: Tensor, *, steps: int, batch: int = 8) -> list[float]:
    """Maximum likelihood of excerpts of the sound, (samples,) compressed; the loss in nats a sample of each step."""
    excerpt = model.config.shape[2]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    losses = []
    for _ in range(steps):
        begin = torch.randint(len(sound) - excerpt + 1, (batch, 1))
        x = sound[begin + torch.arange(excerpt)][:, None, None]
        loss = model.loss(x)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sound", type=Path, help="a WAV file; its channels are mixed")
    parser.add_argument("--out", type=Path, default=Path("continued.wav"))
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--seconds", type=float, default=1.0, help="how much to draw")
    parser.add_argument("--temperature", type=float, default=0.9)
    options = parser.parse_args()
    if options.steps < 1:
        raise ValueError(f"steps is {options.steps}, but expected a number of at least 1")
    if not 0 <= options.seconds < math.inf:
        raise ValueError(f"seconds is {options.seconds}, but expected a finite number of at least 0")
    if not 0 <= options.temperature < math.inf:  # said before the training, not after it
        raise ValueError(f"temperature is {options.temperature}, but expected a finite number of at least 0")

    torch.manual_seed(0)
    sound, rate = (melody(6.0, 8000)[None], 8000) if options.sound is None else read_wav(options.sound)
    compressed = compress(sound.mean(0))
    excerpt = min(2000, len(compressed))
    model = WaveNet(WaveNetConfig(shape=(1, 1, excerpt), layers=8, stacks=2, width=24, skip=96))
    losses = train(model, compressed, steps=options.steps)
    print(f"{losses[0] / math.log(2):.2f} bits a sample at first, {losses[-1] / math.log(2):.2f} at the end")

    model.eval()
    given, drawn = min(rate // 2, len(compressed)), round(options.seconds * rate)
    x = torch.zeros(1, 1, 1, given + drawn)
    x[..., :given] = compressed[:given]
    known = torch.arange(given + drawn) < given
    start = time.perf_counter()
    x = model.complete(x, known, temperature=options.temperature, progress=True)
    print(f"{drawn} samples in {time.perf_counter() - start:.2f} s")
    write_wav(options.out, expand(x.flatten()), rate)
    print(f"{options.out}: {given / rate:.2f} s of the sound, then {drawn / rate:.2f} s drawn")


if __name__ == "__main__":
    main()
