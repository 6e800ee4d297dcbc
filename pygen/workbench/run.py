"""A training run: everything that changes while it trains, the step that changes it, and its way into a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pygen.model import GenerativeModel
from pygen.workbench.averaging import average_into, copy_for_averaging, decay
from pygen.workbench.checkpoint import (
    Checkpoint,
    CheckpointError,
    fill,
    find_checkpoint,
    has_checkpoint,
    model_tensors,
    save_checkpoint,
)
from pygen.workbench.data import Dataset, permutation
from pygen.workbench.families import recipe_of
from pygen.workbench.progress import Progress, Reporter
from pygen.workbench.settings import TrainingConfig

# A resumed run may have other values of these; with other steps, its cosine is another from there on.
_MAY_CHANGE = ("steps", "checkpoint_every", "log_every")


class TrainingDiverged(RuntimeError):
    """A loss or a gradient that is no longer a finite number; the message says where the last good checkpoint is."""


class Run:
    """The state of a run: everything that a checkpoint keeps."""

    def __init__(self, model: GenerativeModel, dataset: Dataset, config: TrainingConfig, device: torch.device) -> None:
        self.model = model.to(device).train()
        self.average = copy_for_averaging(model)
        self.config = config
        self.device = device
        self.data = dataset.to(device)
        self.players = {
            player: [parameter for parameter in parameters if parameter.requires_grad]
            for player, parameters in model.players().items()
        }
        for player, parameters in self.players.items():
            if not parameters:
                raise ValueError(f"player {player!r} of {type(model).__name__} has no parameters to train")
        for player in config.player_rates:
            if player not in self.players:
                raise ValueError(f"player_rates names {player!r}, but the players are {', '.join(self.players)}")
        self.optimizers = {player: self._optimizer(parameters) for player, parameters in self.players.items()}
        self.facts = {
            "name": dataset.name,
            "origin": dataset.origin,
            "fingerprint": dataset.fingerprint(),
            "class_names": list(dataset.class_names),
        }
        self.step = 0
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self._pending: list[Tensor] = []  # (players, 2) of each step since the last record: losses, gradient norms
        self._epoch: tuple[int, Tensor] = (-1, torch.empty(0))

    def go(
        self,
        folder: Path | None,
        progress: bool | Callable[[Progress], None],
        label: str,
        record: Callable[[dict[str, Any]], None],
    ) -> None:
        """Train until the last step, writing checkpoints into `folder`."""
        config = self.config
        before, start = self.seconds, time.monotonic()
        with Reporter(progress, label, config.steps, config.batch_size) as reporter:
            reporter.start(self.step)
            while self.step < config.steps:
                self._pending.append(self._train_step())
                self.step += 1
                last = self.step == config.steps
                keep = folder is not None and (
                    last or (config.checkpoint_every > 0 and self.step % config.checkpoint_every == 0)
                )
                if keep or last or self.step % config.log_every == 0:
                    self.seconds = before + time.monotonic() - start
                    record(self._record(folder))
                if keep and folder is not None:
                    save_checkpoint(folder, self.checkpoint())
                if last or reporter.due():
                    reporter.report(self.step, self._losses())
            self.seconds = before + time.monotonic() - start

    def _train_step(self) -> Tensor:
        """One step of every player and of the average; its losses and gradient norms, (players, 2), not fetched yet."""
        config = self.config
        rows = self._batch_rows()
        x = self.data.values(rows)
        condition = None
        if self.model.config.classes is not None and self.data.labels is not None:
            condition = self.data.labels[rows]
        figures = []
        for player, parameters in self.players.items():
            optimizer = self.optimizers[player]
            rate = config.learning_rate * config.player_rates.get(player, 1.0) * config.rate(self.step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with self._gradients_of(player):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.autocast == "bf16"):
                    loss = self.model.loss(x, player=player, condition=condition)
                loss.backward()
            norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
            if config.clip is not None:
                clip_grads_with_norm_(parameters, config.clip, norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            figures.append(torch.stack([loss.detach().float(), norm.float().to(loss.device)]))
        beta = decay(self.step + 1, config.batch_size, config.ema_images, config.ema_ramp)
        average_into(self.average, self.model, beta)
        return torch.stack(figures)

    @contextlib.contextmanager
    def _gradients_of(self, player: str) -> Iterator[None]:
        # What another player will not use need not be computed.
        mine = {id(parameter) for parameter in self.players[player]}
        others = [parameter for group in self.players.values() for parameter in group if id(parameter) not in mine]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def _batch_rows(self) -> Tensor:
        n, size = len(self.data), self.config.batch_size
        position, rows = self.step * size, []
        while size > 0:
            epoch, offset = divmod(position, n)
            if self._epoch[0] != epoch:
                self._epoch = epoch, permutation(n, self.config.seed, epoch).to(self.device)
            piece = self._epoch[1][offset : offset + size]
            rows.append(piece)
            position, size = position + len(piece), size - len(piece)
        return torch.cat(rows)

    def _record(self, folder: Path | None) -> dict[str, Any]:
        """What happened since the last record, put into the history; TrainingDiverged if a number is not finite."""
        figures = torch.stack(self._pending).double().cpu()
        wrong = (~figures.isfinite()).nonzero()
        if len(wrong):
            step, player, what = wrong[0].tolist()
            saved = folder is not None and has_checkpoint(folder)
            kept = f"; {find_checkpoint(folder)} is the last good checkpoint" if folder is not None and saved else ""
            raise TrainingDiverged(
                f"the {('loss', 'gradient norm')[what]} of player {list(self.players)[player]!r} became "
                f"{float(figures[step, player, what])} in step {self.step - len(figures) + step + 1} of "
                f"{self.config.steps}: try a lower learning_rate{kept}"
            )
        self._pending = []
        losses, norms = figures.mean(0).unbind(1)
        found = {
            "step": self.step,
            "seconds": self.seconds,
            "learning_rate": self.config.learning_rate * self.config.rate(self.step - 1),
            "losses": dict(zip(self.players, losses.tolist(), strict=True)),
            "gradient_norms": dict(zip(self.players, norms.tolist(), strict=True)),
        }
        self.history.append(found)
        return found

    def _losses(self) -> dict[str, float]:
        if not self._pending:
            last: dict[str, float] = self.history[-1]["losses"] if self.history else {}
            return last
        means = torch.stack(self._pending)[:, :, 0].mean(0)
        return dict(zip(self.players, means.tolist(), strict=True))

    def checkpoint(self) -> Checkpoint:
        """What a checkpoint keeps of this run now."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        moments = {
            f"{player}/{names[id(parameter)]}/{moment}": value
            for player, optimizer in self.optimizers.items()
            for parameter, state in optimizer.state.items()
            for moment, value in state.items()
        }
        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        family, recipe = recipe_of(self.model) or (None, None)
        return Checkpoint(
            family=family,
            recipe=recipe,
            model_class=f"{type(self.model).__module__}.{type(self.model).__qualname__}",
            config=self.model.config_dict(),
            step=self.step,
            seconds=self.seconds,
            training=dataclasses.asdict(self.config),
            data=self.facts,
            history=self.history,
            weights=model_tensors(self.model),
            average=model_tensors(self.average),
            optimizers=moments,
            generators=generators,
        )

    def restore(self, saved: Checkpoint, folder: Path) -> None:
        """Take up the state of a checkpoint; CheckpointError where it is of another model, data or configuration."""
        now = self.checkpoint()
        for what, old, new in (
            ("the model's", {"class": saved.model_class}, {"class": now.model_class}),
            ("the model's", saved.config, now.config),
            ("the training's", saved.training, now.training),
        ):
            plain = json.loads(json.dumps(new))
            for key in sorted(old.keys() | plain.keys()):
                if old.get(key) != plain.get(key) and not (what == "the training's" and key in _MAY_CHANGE):
                    raise CheckpointError(
                        f"{folder} was trained with {what} {key} = {old.get(key)}, but is now to go on with "
                        f"{plain.get(key)}: use the same value, or another folder"
                    )
        if saved.data.get("fingerprint") != self.facts["fingerprint"]:
            raise CheckpointError(
                f"{folder} was trained on other pictures ({saved.data.get('name')}) than those given now "
                f"({self.facts['name']}): use the same data, or another folder"
            )
        if saved.step > self.config.steps:
            raise CheckpointError(f"{folder} has done {saved.step} steps, but steps is {self.config.steps}")
        fill(self.model, saved.weights, str(folder))
        fill(self.average, saved.average, str(folder))
        self._restore_optimizers(saved.optimizers, folder)
        torch.set_rng_state(saved.generators["cpu"])
        if self.device.type == "cuda" and "cuda" in saved.generators:
            torch.cuda.set_rng_state(saved.generators["cuda"], self.device)
        self.step, self.seconds, self.history = saved.step, saved.seconds, list(saved.history)

    def _restore_optimizers(self, moments: Mapping[str, Tensor], folder: Path) -> None:
        parameters = dict(self.model.named_parameters())
        for key, value in moments.items():
            player, _, rest = key.partition("/")
            name, _, moment = rest.rpartition("/")
            if player not in self.optimizers or name not in parameters:
                raise CheckpointError(f"{folder} has optimizer state {key}, but the model has no such parameter")
            # Adam keeps its step count on the CPU whatever the device.
            where = value.device if moment == "step" else self.device
            self.optimizers[player].state[parameters[name]][moment] = value.to(where)

    @contextlib.contextmanager
    def generators(self) -> Iterator[None]:
        """Seed PyTorch's generators for the run and make cuDNN repeat itself; put both back after it."""
        devices = [self.device] if self.device.type == "cuda" else []
        cudnn = torch.backends.cudnn
        before = cudnn.benchmark, cudnn.deterministic
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.config.seed)
            try:
                cudnn.benchmark, cudnn.deterministic = False, True
                yield
            finally:
                cudnn.benchmark, cudnn.deterministic = before

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        decayed = [parameter for parameter in parameters if parameter.ndim >= 2]
        plain = [parameter for parameter in parameters if parameter.ndim < 2]
        groups = [{"params": decayed, "weight_decay": self.config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=self.config.learning_rate, betas=self.config.betas
        )
