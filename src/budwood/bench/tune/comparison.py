"""Run a comparison: sweep, choice on validation data, final runs and tests.

Each finished step is a file, so that an interrupted comparison continues where it was.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from budwood import records
from budwood.bench.tune.plan import Material, Plan, Trial, count_at, fit_rank, read_material
from budwood.bench.tune.rows import best_rates, first_finals, summary
from budwood.errors import DivergedError, InputError
from budwood.files import read_json, write_text
from budwood.fingerprint import fingerprint_of
from budwood.progress import ProgressBar
from budwood.runs import RunFolder
from budwood.tune.data.encoding import EncodedExample, encode, longest_for, n_supervised
from budwood.tune.data.sources import read_text
from budwood.tune.evaluate.divergence import CHAT, make_texts
from budwood.tune.evaluate.scores import Score
from budwood.tune.evaluate.suite import TEXT, Suite, routing_rows
from budwood.tune.evaluate.tasks import Task, draw, find_tasks, task_of
from budwood.tune.finetuning import FinetuneResult, finetune
from budwood.tune.methods import attach, is_ablation, parse_tuner
from budwood.tune.methods.slim import Slim
from budwood.tune.slim.keeper import is_slim
from budwood.tune.tasks import MADE
from budwood.tune.training.run import fingerprint
from budwood.tune.training.strength import rewound

_PROBE_WINDOWS, _PROBE_REPLIES = 6, 12


class Comparison:
    """A comparison in a folder.

    Args:
        plan: what to compare.
        name: name of the model, for records.
        model: the base model; its weights stay as they are.
        tokenizer: of the model.
        data: folder with training, test and general data.
        output: folder of the comparison.
        bar: opens a progress bar.
        say: prints a remark.
    """

    def __init__(
        self,
        plan: Plan,
        name: str,
        model: Any,
        tokenizer: Any,
        data: Path,
        output: Path,
        bar: ProgressBar,
        say: Callable[[str], None],
    ) -> None:
        self.plan, self.name, self.model, self.tokenizer = plan, name, model, tokenizer
        self.data, self.output, self.bar, self.say = data, output, bar, say
        self.material: Material = read_material(plan, data)
        longest = longest_for(model, plan.settings.max_length)
        self.rows = encode(self.material.all_train, tokenizer, longest).rows
        self.tests = find_tasks(plan.targets, (), data, plan.limit, 0)
        self.general = find_tasks((), plan.general, data, plan.general_limit, 0)
        self.validation = tuple(
            task_of(f"val_{task}", examples, exact=task in MADE)
            for task, examples in self.material.validation.items()
        )
        state = plan.comparable | {
            "model": name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "defaults": Slim.defaults,
            "data": fingerprint(self.rows),
            "weights": fingerprint_of(model),
            "tests": self._tested(),
        }
        self.folder = RunFolder(output, state)
        self._texts: dict[str, list[EncodedExample]] | None = None
        self._ranks: dict[str, int] = {}

    def _tested(self) -> str:
        """A digest of all questions and of the text, wherever they lie."""
        asked = [
            [task.name, [[ex.messages, ex.choices, ex.answer] for ex in task.examples or ()]]
            for task in (*self.validation, *self.tests, *self.general)
        ]
        return fingerprint([*asked, read_text(self.data / TEXT)])

    def run(self) -> list[dict[str, Any]]:
        """Do what is left to do, and return the rows of all runs, the base model's first."""
        for method in self.plan.methods:
            self.rank(method)  # refuses what cannot be compared, before hours of work
        befores = self.base_scores()
        rows = [self.base_row(befores)]
        sweep = [
            Trial(method, lr, self.plan.seeds[0])
            for method in self.plan.methods
            for lr in self.plan.lrs
        ]
        done = self.run_all(sweep)
        done |= {trial: row for trial, row in self.earlier().items() if trial not in done}
        self.need_tried(done)
        place = self.plan.methods.index
        done = {trial: done[trial] for trial in sorted(done, key=lambda trial: place(trial.method))}
        finals = [
            Trial(method, lr, seed)
            for method, lr in best_rates(done).items()
            for seed in self.plan.seeds
        ]
        done |= self.run_all([trial for trial in finals if trial not in done])
        for trial in finals:
            if done[trial].get("status") == "complete":
                done[trial] |= self.test(trial, befores)
        for trial, row in done.items():
            rows.append({**row, "final": trial in finals})
        return rows

    # Each step reads its file if there is one.

    def texts(self) -> dict[str, list[EncodedExample]]:
        """Windows of text, and the base model's replies."""
        if self._texts is None:
            file = self.output / "texts.json"
            if not file.exists():
                with self.bar("replies of the base model") as progress:
                    made = make_texts(
                        self.model,
                        self.tokenizer,
                        text=self.data / TEXT,
                        n_windows=self.plan.windows,
                        n_prompts=self.plan.prompts,
                        progress=progress,
                    )
                write_text(file, json.dumps(made))
            self._texts = read_json(file)
        return self._texts or {}

    def base_scores(self) -> list[Score]:
        """Scores of the base model on everything."""
        file = self.output / "base.json"
        if not file.exists():
            with self.bar("base model") as progress:
                suite = self.suite((*self.validation, *self.general, *self.tests))
                scores = suite.after(self.model, self.tokenizer, progress)
                scores += suite.drift(self.model, self.tokenizer, progress)[0]
            write_text(file, json.dumps([score.as_dict() for score in scores]))
        return [Score.from_dict(item) for item in read_json(file)]

    def base_row(self, befores: Sequence[Score]) -> dict[str, Any]:
        """The row of the base model."""
        row = {"method": "base", "lr": None, "seed": None, "params": 0, "rank": 0}
        return row | {"status": "complete", "final": True} | self.summed(befores, befores)

    def run_all(self, trials: Sequence[Trial]) -> dict[Trial, dict[str, Any]]:
        """Train and evaluate each trial; a failure is noted and the next one runs."""
        rows = {}
        for i, trial in enumerate(trials, 1):
            self.say(f"{i}/{len(trials)} {trial.name}")
            rows[trial] = self.trial(trial)
        return rows

    def earlier(self) -> dict[Trial, dict[str, Any]]:
        """Runs of the sweep that are in the folder already, at any rate."""
        files = sorted((self.output / "runs").glob("*/record.json"))
        rows = [records.read(file).rows[0] for file in files]
        trials = {Trial(row["method"], row["lr"], row["seed"]): dict(row) for row in rows}
        methods, seed = self.plan.methods, self.plan.seeds[0]
        return {
            trial: row
            for trial, row in trials.items()
            if trial.method in methods and trial.seed == seed
        }

    def need_tried(self, trials: Collection[Trial]) -> None:
        """Check that every method has a run, where no rates are given.

        Raises:
            InputError: a method has none.
        """
        tried = {trial.method for trial in trials}
        untried = [name for name in self.plan.methods if name not in tried]
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
        row, start = self.described(trial), self.start(trial)
        try:
            result = self.trained(trial)
        except DivergedError as error:
            self.say(str(error))
            self.note(trial, row | {"status": "diverged"}, [])
            return row | {"status": "diverged"}
        adapted, history = result.model, result.history
        row |= {"params": result.n_trained_parameters, "train_seconds": _seconds(history, began)}
        scores = self.validated(trial.name, adapted)
        if is_slim(adapted):
            self.note_routing(trial, adapted)
        self.rewind(trial, adapted, start, befores)
        adapted.unload()
        losses = [entry["loss"] for entry in history if "loss" in entry]
        row |= {"train_loss": losses[-1] if losses else None}
        row |= {"status": "complete"} | self.summed(befores, scores)
        self.keep(trial, "scores.json", [score.as_dict() for score in scores])
        self.note(trial, row, history)
        return row

    def test(self, trial: Trial, befores: Sequence[Score]) -> dict[str, Any]:
        """Scores of a chosen run on the target tests and the general tasks."""
        file = self.path(trial) / "tests.json"
        if not file.exists():
            adapted = self.trained(trial).model  # again, where only the record was kept
            with self.bar(f"testing {trial.name}") as progress:
                suite = self.suite((*self.general, *self.tests))
                scores = suite.after(adapted, self.tokenizer, progress)
            adapted.unload()
            self.keep(trial, "tests.json", [score.as_dict() for score in scores])
        return self.summed(befores, [Score.from_dict(item) for item in read_json(file)])

    def start(self, trial: Trial) -> dict[str, Any]:
        """Parameters of a trial's fresh adapter; none where nothing goes back to them."""
        if not self.plan.strengths:
            return {}
        tuner = parse_tuner(trial.method).fitted_to(n_supervised(self.rows))
        adapted = attach(tuner, self.model, self.rank(trial.method), trial.seed)
        named = adapted.named_parameters()
        start = {name: p.detach().clone() for name, p in named if p.requires_grad}
        adapted.unload()
        return start

    def validated(self, name: str, adapted: Any) -> list[Score]:
        """Scores of a trained adapter on validation data and on text."""
        with self.bar(f"evaluating {name}") as progress:
            suite = self.suite(self.validation)
            scores = suite.after(adapted, self.tokenizer, progress)
            return scores + suite.drift(adapted, self.tokenizer, progress)[1]

    def rewind(
        self, trial: Trial, adapted: Any, start: Mapping[str, Any], befores: Sequence[Score]
    ) -> None:
        """Scores of a trained adapter part of the way back to the base model, in ``rewound.json``.

        Source: WiSE-FT, arXiv 2109.01903, for every method.
        """
        rows = []
        for strength in self.plan.strengths:
            with rewound(adapted, strength, start):
                scores = self.validated(f"{trial.name} at {strength:g}", adapted)
            rows.append(self.described(trial) | {"strength": strength})
            rows[-1] |= {"status": "complete"} | self.summed(befores, scores)
        if rows:
            self.keep(trial, "rewound.json", rows)

    def summed(self, befores: Sequence[Score], afters: Sequence[Score]) -> dict[str, Any]:
        """:func:`summary`, with the floors of the targets."""
        constants = {task.name: task.constant for task in self.tests}
        known = {name: value for name, value in constants.items() if value is not None}
        return summary(befores, afters, known)

    def trained(self, trial: Trial) -> FinetuneResult:
        """An adapter, trained now or before."""
        tuner = parse_tuner(trial.method).fitted_to(n_supervised(self.rows))
        self.path(trial).mkdir(parents=True, exist_ok=True)
        with self.bar(trial.name) as progress:
            return finetune(
                self.model,
                self.rows,
                self.path(trial) / "adapter",
                method=trial.method,
                rank=self.rank(trial.method),
                tokenizer=self.tokenizer,
                args=self.plan.settings,
                lr=trial.lr,
                seed=trial.seed,
                texts_file=self.output / f"own-{tuner.n_texts}.json",
                record=False,
                probe=self.probe,
                progress=progress,
            )

    def rank(self, method: str) -> int:
        """The rank at which a method has as many trained parameters as the reference."""
        if method not in self._ranks:
            if own := parse_tuner(method).own_rank:
                self._ranks[method] = own
            elif method == self.plan.reference or is_ablation(method):
                self._ranks[method] = self.plan.rank
            else:
                reference = parse_tuner(self.plan.reference)
                wanted = count_at(reference, self.model)(self.plan.rank)
                tuner = parse_tuner(method)
                count = count_at(tuner, self.model)
                self._ranks[method] = fit_rank(count, wanted, tuner.ranks(self.model))
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
        """The columns of a row that describe the run."""
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


def _seconds(history: Sequence[dict[str, Any]], began: float) -> float:
    noted = [row["seconds"] for row in history if "seconds" in row]
    return noted[-1] if noted else round(time.perf_counter() - began, 1)
