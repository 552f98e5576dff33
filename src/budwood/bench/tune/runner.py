"""Runs a comparison: sweep, choice on validation data, final runs and tests.

Each finished step is a file, so that a comparison that was cut off goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from budwood import records
from budwood.bench.tune.plan import Material, Plan, read_material
from budwood.errors import DivergedError, InputError
from budwood.files import write_text
from budwood.runs import RunFolder, read_json
from budwood.tune.base import fingerprint_of
from budwood.tune.data import read_text
from budwood.tune.encoding import Row, encode, longest_for, n_learnt
from budwood.tune.evaluate.harness import Task, draw, task_of
from budwood.tune.evaluate.routing import routing_rows
from budwood.tune.evaluate.scores import Score, mean_of
from budwood.tune.evaluate.suite import CHAT, GENERAL, TARGETS, TEXT, Suite, find_tasks, make_texts
from budwood.tune.methods import attach, count_at, fit_rank, n_trainable, parse_tuner
from budwood.tune.own_text import kept_text
from budwood.tune.train import adapter_of, fingerprint, is_slim, train

_PROBE_WINDOWS, _PROBE_REPLIES = 6, 12

Bar = Callable[[str], Any]
"""Makes a context manager that yields a function (done, total, note), from a title."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run: a method, a learning rate and a seed."""

    method: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        plain = re.sub(r"[^a-z0-9.+-]+", "_", self.method.lower())
        return f"{plain}-lr{self.lr:g}-seed{self.seed}"


class Comparison:
    """A comparison in a folder.

    Args:
        plan: what to compare.
        name: of the model, for records.
        model: the base model; its weights stay as they are.
        tokenizer: of the model.
        data: folder with training, test and general data.
        output: folder of the comparison.
        bar: for progress.
        say: for remarks.
    """

    def __init__(
        self,
        plan: Plan,
        name: str,
        model: Any,
        tokenizer: Any,
        data: Path,
        output: Path,
        bar: Bar,
        say: Callable[[str], None],
    ) -> None:
        self.plan, self.name, self.model, self.tokenizer = plan, name, model, tokenizer
        self.data, self.output, self.bar, self.say = data, output, bar, say
        self.material: Material = read_material(plan, data)
        longest = longest_for(model, plan.settings.max_length)
        encoded = encode(self.material.all_train, tokenizer, longest)
        self.rows: list[Row] = encoded.rows
        self.tests = find_tasks(TARGETS, (), data, plan.limit, 0)
        self.general = find_tasks((), GENERAL, data, plan.general_limit, 0)
        self.validation = tuple(
            task_of(f"val_{task}", examples) for task, examples in self.material.validation.items()
        )
        state = plan.comparable | {
            "model": name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "data": fingerprint(self.rows),
            "weights": fingerprint_of(model),
            "tests": self._tested(),
        }
        self.folder = RunFolder(output, state)
        self._texts: dict[str, list[Row]] | None = None
        self._ranks: dict[str, int] = {}

    def _tested(self) -> str:
        """A digest of all questions and of the text, wherever they lie."""
        asked = [
            [task.name, [[one.messages, one.choices, one.answer] for one in task.examples or ()]]
            for task in (*self.validation, *self.tests, *self.general)
        ]
        return fingerprint([*asked, read_text(self.data / TEXT)])

    def run(self) -> list[dict[str, Any]]:
        """Everything that is not done yet; returns the rows of all runs, the base model's first."""
        for method in self.plan.methods:
            self.rank(method)  # refuses what cannot be compared, before hours of work
        befores = self.base_scores()
        rows = [self.base_row(befores)]
        sweep = [
            Trial(method, lr, self.plan.seeds[0])
            for method in self.plan.methods
            for lr in self.plan.lrs
        ]
        found = self.run_all(sweep)
        found |= {trial: row for trial, row in self.earlier().items() if trial not in found}
        self.need_tried(found)
        place = self.plan.methods.index
        found = {trial: found[trial] for trial in sorted(found, key=lambda one: place(one.method))}
        finals = [
            Trial(method, lr, seed)
            for method, lr in best_rates(found).items()
            for seed in self.plan.seeds
        ]
        found |= self.run_all([trial for trial in finals if trial not in found])
        for trial in finals:
            if found[trial].get("status") == "complete":
                found[trial] |= self.test(trial, befores)
        for trial, row in found.items():
            rows.append({**row, "final": trial in finals})
        return rows

    # The steps, each of which reads its file where there is one.

    def texts(self) -> dict[str, list[Row]]:
        """Windows of text, and the base model's replies."""
        if self._texts is None:
            file = self.output / "texts.json"
            if not file.exists():
                with self.bar("replies of the base model") as advance:
                    made = make_texts(
                        self.model,
                        self.tokenizer,
                        text=self.data / TEXT,
                        n_windows=self.plan.windows,
                        n_prompts=self.plan.prompts,
                        advance=advance,
                    )
                write_text(file, json.dumps(made))
            self._texts = read_json(file)
        return self._texts or {}

    def own_text(self, n_texts: int) -> list[Row]:
        """Texts that the base model writes by itself, the same for all runs."""
        if not n_texts:
            return []
        file = self.output / f"own-{n_texts}.json"
        with self.bar("text of the base model") as advance:
            return kept_text(file, self.model, self.tokenizer, n_texts, advance)

    def base_scores(self) -> list[Score]:
        """Of the base model, on everything."""
        file = self.output / "base.json"
        if not file.exists():
            with self.bar("base model") as advance:
                suite = self.suite((*self.validation, *self.general, *self.tests))
                scores = suite.after(self.model, self.tokenizer, advance)
                scores += suite.drift(self.model, self.tokenizer, advance)[0]
            write_text(file, json.dumps([score.as_dict() for score in scores]))
        return [Score.from_dict(one) for one in read_json(file)]

    def base_row(self, befores: Sequence[Score]) -> dict[str, Any]:
        """The base model as a row of its own."""
        row = {"method": "base", "lr": None, "seed": None, "params": 0, "rank": 0}
        return row | {"status": "complete", "final": True} | summary(befores, befores)

    def run_all(self, trials: Sequence[Trial]) -> dict[Trial, dict[str, Any]]:
        """Train and evaluate each trial; one that fails is noted and the others go on."""
        found = {}
        for i, trial in enumerate(trials, 1):
            self.say(f"{i}/{len(trials)} {trial.name}")
            found[trial] = self.trial(trial)
        return found

    def earlier(self) -> dict[Trial, dict[str, Any]]:
        """Runs of the sweep that are in the folder, at whatever rate they were made."""
        files = sorted((self.output / "runs").glob("*/record.json"))
        rows = [records.read(file).rows[0] for file in files]
        trials = {Trial(row["method"], row["lr"], row["seed"]): dict(row) for row in rows}
        methods, seed = self.plan.methods, self.plan.seeds[0]
        return {
            trial: row
            for trial, row in trials.items()
            if trial.method in methods and trial.seed == seed
        }

    def need_tried(self, found: Collection[Trial]) -> None:
        """Without rates, every method needs a run that is in the folder.

        Raises:
            InputError: one has none.
        """
        untried = [name for name in self.plan.methods if all(one.method != name for one in found)]
        if untried:
            raise InputError(
                f"{self.output} has no run of {', '.join(untried)} with seed {self.plan.seeds[0]}; "
                "give learning rates"
            )

    def trial(self, trial: Trial) -> dict[str, Any]:
        """One run, its scores on validation data and on text, and its record."""
        file = self.path(trial) / "record.json"
        if file.exists():
            return dict(records.read(file).rows[0])
        befores = self.base_scores()
        began = time.perf_counter()
        row = self.described(trial)
        try:
            adapted, history = self.trained(trial)
        except DivergedError as error:
            self.say(str(error))
            self.note(trial, row | {"status": "diverged"}, [])
            return row | {"status": "diverged"}
        row |= {"params": n_trainable(adapted), "train_seconds": _seconds(history, began)}
        with self.bar(f"evaluating {trial.name}") as advance:
            suite = self.suite(self.validation)
            scores = suite.after(adapted, self.tokenizer, advance)
            scores += suite.drift(adapted, self.tokenizer, advance)[1]
        if is_slim(adapted):
            self.note_routing(trial, adapted)
        adapted.unload()
        losses = [one["loss"] for one in history if "loss" in one]
        row |= {"train_loss": losses[-1] if losses else None}
        row |= {"status": "complete"} | summary(befores, scores)
        self.keep(trial, "scores.json", [score.as_dict() for score in scores])
        self.note(trial, row, history)
        return row

    def test(self, trial: Trial, befores: Sequence[Score]) -> dict[str, Any]:
        """A chosen run on the target tests and the general tasks."""
        file = self.path(trial) / "tests.json"
        if not file.exists():
            adapted, _ = self.trained(trial)  # again, where only the record was kept
            with self.bar(f"testing {trial.name}") as advance:
                suite = self.suite((*self.general, *self.tests))
                scores = suite.after(adapted, self.tokenizer, advance)
            adapted.unload()
            self.keep(trial, "tests.json", [score.as_dict() for score in scores])
        return summary(befores, [Score.from_dict(one) for one in read_json(file)])

    def trained(self, trial: Trial) -> tuple[Any, list[dict[str, Any]]]:
        """An adapter, trained now or before, and its history."""
        tuner = parse_tuner(trial.method).fitted_to(n_learnt(self.rows))
        settings = dataclasses.replace(self.plan.settings, lr=trial.lr, seed=trial.seed)
        rank = self.rank(trial.method)
        data = fingerprint(self.rows)
        state = adapter_of(self.name, self.model, trial.method, settings, rank, data)
        folder = RunFolder(self.path(trial) / "adapter", state)
        if folder.is_complete:
            return self.loaded(trial), folder.history()
        own = self.own_text(tuner.n_own)
        adapted = attach(tuner, self.model, rank, trial.seed)
        try:
            if folder.last_checkpoint() is None:
                tuner.prepare(adapted, self.tokenizer, self.rows, own)
            with self.bar(trial.name) as advance:
                history = train(
                    adapted,
                    self.tokenizer,
                    self.rows,
                    settings,
                    folder,
                    **tuner.training(own),
                    advance=advance,
                    probe=self.probe if settings.probe_every else None,
                )
        except BaseException:
            adapted.unload()
            raise
        return adapted, history

    def loaded(self, trial: Trial) -> Any:
        """The adapter of a run that is over, whose parameters count as trained ones."""
        import peft

        folder = str(self.path(trial) / "adapter")
        return peft.PeftModel.from_pretrained(self.model, folder, is_trainable=True).eval()

    def rank(self, method: str) -> int:
        """The rank that gives a method as many trained parameters as the reference has."""
        if method not in self._ranks:
            tuner, reference = parse_tuner(method), parse_tuner(self.plan.reference)
            if method == self.plan.reference or tuner.is_ablation:
                self._ranks[method] = self.plan.rank
            else:
                wanted = count_at(reference, self.model)(self.plan.rank)
                self._ranks[method] = fit_rank(count_at(tuner, self.model), wanted)
        return self._ranks[method]

    def suite(self, tasks: Sequence[Task]) -> Suite:
        """Some tasks and all texts."""
        return Suite(tuple(tasks), self.texts(), self.plan.style, self.plan.batch)

    def probe(self, model: Any, step: int) -> dict[str, Any]:
        """A point of the learning–forgetting curve, on small parts of validation data and text."""
        tasks = []
        for task in self.validation:
            few = draw(task.examples or (), self.plan.probe_limit, 0)
            tasks.append(dataclasses.replace(task, examples=tuple(few)))
        texts = {}
        for name, rows in self.texts().items():
            texts[name] = rows[: _PROBE_REPLIES if name == CHAT else _PROBE_WINDOWS]
        suite = dataclasses.replace(self.suite(tasks), texts=texts)
        scores = suite.after(model, self.tokenizer)
        befores, afters = suite.drift(model, self.tokenizer)
        model.train()
        found = summary([*scores, *befores], [*scores, *afters])
        return {key: value for key, value in found.items() if not key.endswith("_before")}

    def note_routing(self, trial: Trial, adapted: Any) -> None:
        """Identity share by layer for target and for general text."""
        texts = self.suite(self.validation).routed(adapted, self.tokenizer)
        self.keep(trial, "routing.json", routing_rows(adapted, self.tokenizer, texts))

    def described(self, trial: Trial) -> dict[str, Any]:
        """What a run is, as the beginning of its row."""
        return {
            "method": trial.method,
            "lr": trial.lr,
            "seed": trial.seed,
            "rank": self.rank(trial.method),
        }

    def note(self, trial: Trial, row: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """Write the record of a run."""
        record = records.new_record(
            "bench tune run",
            [row],
            seed=trial.seed,
            config={**self.folder.config, "history": history},
        )
        records.write(record, self.path(trial) / "record.json")

    def histories(self, rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        """Method → history of its first final run."""
        return {
            method: records.read(self.path(trial) / "record.json").config["history"]
            for method, trial in first_finals(rows).items()
        }

    def routing(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Identity share by layer of the reference's first final run; empty if it has none."""
        trial = first_finals(rows).get(self.plan.reference)
        file = self.path(trial) / "routing.json" if trial else None
        return read_json(file) if file and file.exists() else []

    def path(self, trial: Trial) -> Path:
        """The folder of a run."""
        return self.output / "runs" / trial.name

    def keep(self, trial: Trial, name: str, value: Any) -> None:
        """Write a JSON file into the folder of a run."""
        write_text(self.path(trial) / name, json.dumps(value))


def first_finals(rows: Sequence[dict[str, Any]]) -> dict[str, Trial]:
    """The first final run of each method that came to its end."""
    found: dict[str, Trial] = {}
    for row in rows:
        if row.get("final") and row["method"] != "base" and row.get("status") == "complete":
            found.setdefault(row["method"], Trial(row["method"], row["lr"], row["seed"]))
    return found


def best_rates(found: dict[Trial, dict[str, Any]]) -> dict[str, float]:
    """The learning rate of each method that does best on validation data.

    A tie goes to the lower loss, and then to the lower rate.

    Raises:
        InputError: all runs of all methods diverged.
    """
    best: dict[str, tuple[tuple[float, float, float], float]] = {}
    for trial, row in found.items():
        if row.get("status") != "complete":
            continue
        key = (-row["validation"], row["validation_loss"], trial.lr)
        if trial.method not in best or key < best[trial.method][0]:
            best[trial.method] = (key, trial.lr)
    if not best:
        raise InputError("every run diverged; give lower learning rates")
    return {method: lr for method, (_, lr) in best.items()}


def summary(befores: Sequence[Score], afters: Sequence[Score]) -> dict[str, Any]:
    """Columns of a row: of each task, and means over target, validation and general tasks."""
    known = {score.key: score for score in befores}
    row: dict[str, Any] = {}
    for score in afters:
        row[f"{score.metric}_{score.task}"] = score.value
    groups = {
        "validation": [s for s in afters if s.task.startswith("val_")],
        "target": [s for s in afters if s.task in TARGETS],
        "general": [s for s in afters if s.task in GENERAL],
    }
    for name, scores in groups.items():
        for metric, suffix in (("accuracy", ""), ("loss", "_loss")):
            mine = [score for score in scores if score.metric == metric]
            if mine:
                base = [known[score.key] for score in mine]
                row[f"{name}{suffix}"] = mean_of(name, mine)
                row[f"{name}{suffix}_before"] = mean_of(name, base)
    for score in afters:
        if score.metric == "perplexity":
            name = "perplexity" if score.task != CHAT else "perplexity_of_replies"
            row[name], row[f"{name}_before"] = score.value, known[score.key].value
        if score.metric == "kl":
            row["kl_chat" if score.task == CHAT else "kl_text"] = score.value
    return row


def _seconds(history: Sequence[dict[str, Any]], began: float) -> float:
    noted = [one["seconds"] for one in history if "seconds" in one]
    return noted[-1] if noted else round(time.perf_counter() - began, 1)
