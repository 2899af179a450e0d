"""From a recipe to a spec: every `use:` resolved, every field typed, every cross-component rule checked. No
torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from cvx_core import precision
from cvx_core.card import Card
from cvx_core.config import Config
from cvx_core.degrees import Degrees, Limits, Request
from cvx_core.errors import FormatError, PluginError, Problem, RecipeError, did_you_mean
from cvx_core.fields import FieldReader
from cvx_core.mesh import MeshError, check, solve
from cvx_core.nesting import stated_choice
from cvx_core.recipe import Address, Recipe
from cvx_core.registry import Choice, Component, Registry
from cvx_core.run_config import LoaderConfig, RunConfig, VideoConfig
from cvx_core.strategy import strategy_notes

SECTIONS = (
    "predictor",
    "adapter",
    "text_encoder",
    "autoencoder",
    "scheduler",
    "dataset",
    "reader",
    "optimizer",
    "task",
)
WEIGHTED = ("predictor", "adapter", "text_encoder", "autoencoder")
DEFAULTS = {"scheduler": "ddim", "reader": "auto", "optimizer": "adamw"}


@dataclass(frozen=True)
class Spec:
    """A recipe whose every name is a component and every field a typed value; all that building needs."""

    recipe: Recipe
    registry: Registry
    run: RunConfig
    choices: Mapping[str, Choice]
    parallel: tuple[Choice, ...] = ()
    notes: tuple[str, ...] = ()
    card: Card = field(default_factory=Card)
    adapters: tuple[Choice, ...] = ()

    @property
    def requests(self) -> list[Request]:
        """What the strategies ask of the mesh."""
        return [choice.config.request(choice.name) for choice in self.parallel]

    @property
    def limits(self) -> Limits:
        """What sizes of the mesh the components go with."""
        configs = [choice.config for choice in (*self.choices.values(), *self.parallel)]
        found = (config.limits(self) for config in configs if isinstance(config, Config))
        return [item for limits in found for item in limits.items()]

    def mesh(self, world: int) -> Degrees:
        """Return the ranks along the axes of a mesh of `world` processes. Raises MeshError."""
        return solve(self.requests, world, self.limits)

    @property
    def video(self) -> VideoConfig:
        return self.run.video

    @property
    def loader(self) -> LoaderConfig:
        return self.run.loader

    @property
    def output(self) -> Path:
        return self.run.output or Path("runs") / self.run.name

    @property
    def unbuilt(self) -> frozenset[str]:
        """Sections that are stated but not built: the task reads only their rules, or the dataset has done
        their work.
        """
        replaced = getattr(self.config("dataset"), "replaces", ())
        return frozenset((*getattr(self.config("task"), "unbuilt", ()), *replaced))

    def config(self, section: str) -> Any:
        """Return a section's config, or None where the recipe has no such section."""
        if section in ("video", "loader"):
            return getattr(self.run, section)
        return self.choices[section].config if section in self.choices else None

    def name_of(self, section: str) -> str:
        """Return the component's name in a section, "" where there is none."""
        return self.choices[section].name if section in self.choices else ""

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """The recipe with every field stated; it can be run as it is."""
        data = json.loads(self.run.model_dump_json())
        data["output"] = str(self.output)
        data |= {section: stated_choice(choice) for section, choice in self.choices.items()}
        if not self._uses("loader"):
            del data["loader"]
        if self.parallel:
            data["parallel"] = [stated_choice(choice) for choice in self.parallel]
        if self.adapters:
            data["adapters"] = [stated_choice(choice) for choice in self.adapters]
        return data

    @cached_property
    def digest(self) -> str:
        """The first 16 hex digits of the SHA-256 of the resolved recipe."""
        text = json.dumps(self.resolved, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML."""
        return yaml.safe_dump(self.resolved, sort_keys=False, allow_unicode=True)

    def _uses(self, section: str) -> bool:
        task = self.choices["task"].config
        return section in (*getattr(task, "needs", ()), *getattr(task, "optional", ()))


def resolve(recipe: Recipe, registry: Registry | None = None, world: int | None = None) -> Spec:
    """Turn a recipe into a spec. Raises RecipeError with every problem found, before anything is built.

    world: the number of processes, if known; then the mesh must multiply out to it.
    """
    return _Resolver(recipe, registry or Registry.discover(), world).spec()


class _Resolver:
    def __init__(self, recipe: Recipe, registry: Registry, world: int | None):
        self.recipe, self.registry, self.world = recipe, registry, world
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.choices: dict[str, Choice] = {}
        self.fields = FieldReader(recipe, registry, self.problems)

    def spec(self) -> Spec:
        self._check_top_level()
        found = self._expand_model()
        task = self._choose_task()
        for section in sorted(SECTIONS[:-1], key=lambda name: name != "dataset"):  # it may replace others
            self._choose_section(section, found.get(section), task)
        in_order = ("task", *SECTIONS[:-1])
        self.choices = {section: self.choices[section] for section in in_order if section in self.choices}
        run = self._run_config(task)
        parallel = self._choose_parallel()
        adapters = self._choose_adapters(task)
        self._raise()
        assert task is not None
        spec = Spec(
            self.recipe,
            self.registry,
            run,
            self.choices,
            parallel,
            tuple(self.notes),
            self._card() or Card(),
            adapters,
        )
        mesh = self._check_across(spec)
        self._raise()
        more = [precision.note(spec), *strategy_notes(spec, mesh)]
        return replace(spec, notes=(*spec.notes, *(note for note in more if note is not None)))

    def _raise(self) -> None:
        if self.problems:
            unique = dict.fromkeys(self.problems)
            raise RecipeError(sorted(unique, key=_by_line))

    def _check_top_level(self) -> None:
        known = {*SECTIONS, *RunConfig.model_fields, "parallel", "adapters", "model"}
        for key in self.recipe.data:
            if key not in known:
                self._problem((key,), f"no such section.{did_you_mean(key, known)}")

    def _expand_model(self) -> Mapping[str, Any]:
        """Read `model: PATH` through the first format that recognises the folder."""
        if "model" not in self.recipe.data:
            return {}
        value, address = self.recipe.data["model"], ("model",)
        if not isinstance(value, str):
            self._problem(address, f"got {value!r}; expected the path of a model folder.")
            return {}
        path = self.recipe.base_of(address) / value
        if not path.exists():
            self._problem(address, f"no such folder: {path}. Give a folder with model_index.json.")
            return {}
        try:
            for component, _ in self.registry.all("format"):
                sections = getattr(component.config, "sections", None)
                if sections is not None and (found := sections(path, self.registry)) is not None:
                    data, notes = found
                    self.notes += notes
                    return data
        except (FormatError, PluginError) as error:
            self._problem(address, str(error))
            return {}
        self._problem(
            address, f"no format recognises {path}. Give a folder with model_index.json, or state each part."
        )
        return {}

    def _choose_task(self) -> Choice | None:
        if "task" not in self.recipe.data:
            known = ", ".join(self.registry.names("task"))
            self._problem(("task",), f"is required. Add `task: {{use: ...}}` with one of: {known}.")
            return None
        choice = self.fields.choice("task", ("task",), self.recipe.data["task"])
        if choice is not None:
            self.choices["task"] = choice
        return choice

    def _choose_section(self, section: str, found: Mapping[str, Any] | None, task: Choice | None) -> None:
        """Resolve one section from what the recipe says, over what the model folder says, over defaults."""
        given = self.recipe.data.get(section)
        needs = task.config.needs if task else SECTIONS
        wanted = section in needs or (task is not None and section in task.config.optional)
        if given is None and (found is None or not wanted):
            if section in needs and task is not None:
                self._default(section, task)
            return
        if task is not None and not wanted:
            loads = section == "adapter" and "adapters" in task.config.optional
            remedy = "Give what it trained in `adapters`" if loads else "Remove the section"
            self._problem((section,), f"task {task.name!r} does not use it. {remedy}.")
            return
        data = merge(found, given) if isinstance(given, Mapping) and found is not None else given or found
        self._take(section, data, given)

    def _take(self, section: str, data: Any, given: Any) -> None:
        fill = self._card_defaults(section) if isinstance(data, Mapping) else {}
        choice = self.fields.choice(section, (section,), data, fill, weights=section in WEIGHTED)
        if choice is not None and self._is_in_place(choice, section, (section,)):
            self.choices[section] = choice
            if given is None:
                weights = getattr(getattr(choice.weights, "config", None), "path", None)
                self.notes.append(f"{section}: {choice.name}" + (f" from {weights}" if weights else ""))

    def _default(self, section: str, task: Choice) -> None:
        dataset = self.choices.get("dataset")
        if dataset is not None and section in getattr(dataset.config, "replaces", ()):
            return
        if section in DEFAULTS:
            self._take(section, {"use": DEFAULTS[section]}, {})
            return
        known = ", ".join(self.registry.names(section)) or "none"
        hint = " or `model: PATH`" if section in ("predictor", "text_encoder", "autoencoder") else ""
        self._problem(
            (section,),
            f"task {task.name!r} needs it. Add `{section}: {{use: ...}}`{hint}. Known: {known}.",
        )

    def _card(self) -> Card | None:
        predictor = self.choices.get("predictor")
        rules = getattr(predictor.config, "rules", None) if predictor else None
        return rules() if rules is not None else None

    def _card_defaults(self, section: str) -> dict[str, Any]:
        card = self._card()
        if card is None:
            return {}
        return {name: value for (owner, name), value in card.defaults().items() if owner == section}

    def _run_config(self, task: Choice | None) -> RunConfig:
        data = {key: self.recipe.data[key] for key in RunConfig.model_fields if key in self.recipe.data}
        if isinstance(data.get("video", {}), dict):
            data["video"] = {**self._card_defaults("video"), **data.get("video", {})}
        if (
            task is not None
            and "loader" in data
            and "loader" not in (*task.config.needs, *task.config.optional)
        ):
            self._problem(("loader",), f"task {task.name!r} does not use it. Remove the section.")
        data.setdefault("name", Path(self.recipe.source).stem)
        data.setdefault("output", f"runs/{data['name']}")
        config = self.fields.validate(RunConfig, (), data, "a recipe")
        return config if config is not None else RunConfig()

    def _choose_parallel(self) -> tuple[Choice, ...]:
        items = self.recipe.data.get("parallel") or []
        if not isinstance(items, list):
            self._problem(("parallel",), f"got {items!r}; expected a list such as `- {{use: zero2}}`.")
            return ()
        choices = [self.fields.choice("strategy", ("parallel", i), item) for i, item in enumerate(items)]
        return tuple(choice for choice in choices if choice is not None)

    def _choose_adapters(self, task: Choice | None) -> tuple[Choice, ...]:
        """Resolve the adapters that are loaded, each of which needs weights."""
        items = self.recipe.data.get("adapters") or []
        if not isinstance(items, list):
            self._problem(("adapters",), f"got {items!r}; expected a list of mappings with `use:`.")
            return ()
        if items and task is not None and "adapters" not in task.config.optional:
            self._problem(("adapters",), f"task {task.name!r} does not use it. Remove the section.")
            return ()
        found = []
        for index, item in enumerate(items):
            address = ("adapters", index)
            choice = self.fields.choice("adapter", address, item, weights=True)
            if choice is None or not self._is_in_place(choice, "adapters", address):
                continue
            if choice.weights is None:
                self._problem(address, "has no weights. Add `weights: {use: FORMAT, path: ...}`.")
            found.append(choice)
        return tuple(found)

    def _is_in_place(self, choice: Choice, section: str, address: Address) -> bool:
        """Report an adapter that is for the other section: one is trained, any number are loaded."""
        if section not in ("adapter", "adapters"):
            return True
        own = _section_of(choice.component)
        if own == section:
            return True
        fit = [c.name for c, _ in self.registry.all("adapter") if _section_of(c) == section]
        known = ", ".join(fit) or "none"
        self._problem(address, f"{choice.name!r} goes into `{own}`. Known here: {known}.")
        return False

    def _check_across(self, spec: Spec) -> Degrees | None:
        """Run the card's rules and every component's own check; return the mesh, if it can be known."""
        if "predictor" in spec.choices:
            self._collect((), spec.card.check(spec))
        for section, choice in spec.choices.items():
            if isinstance(choice.config, Config):
                self._collect((section,), choice.config.check(spec))
        self._collect((), precision.problems(spec))
        if "loader" in self.recipe.data:
            self._collect(("loader",), spec.loader.check(spec))
        for listed in ("parallel", "adapters"):
            for index, choice in enumerate(getattr(spec, listed)):
                self._collect((listed, index), choice.config.check(spec))
        world = getattr(spec.config("task"), "ranks", None) or self.world
        try:
            if world is not None:
                return spec.mesh(world)
            check(spec.requests)
        except MeshError as error:
            address = ("parallel",) if error.owner is None else ("parallel", error.owner)
            self._problem(address, str(error))
        return None

    def _collect(self, base: Address, problems: Iterable[Problem]) -> None:
        for problem in problems:
            tail = tuple(part for part in problem.path.split(".") if part)
            self._problem((*base, *tail), problem.message)

    def _problem(self, address: Address, message: str) -> None:
        self.problems.append(self.recipe.problem(address, message))


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `under` updated by `over`, mapping by mapping. Another `use` replaces the whole mapping."""
    if "use" in over and over["use"] != under.get("use"):
        kept = {key: under[key] for key in ("weights", "tokenizer") if key in under}
        return {**kept, **over}
    result = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merge(result[key], value) if both else value
    return result


def _section_of(adapter: Component) -> str:
    return str(getattr(adapter.config, "section", "adapter"))


def _by_line(problem: Problem) -> tuple[str, int]:
    file, _, line = problem.where.rpartition(":")
    return (file, int(line)) if line.isdigit() else (problem.where, 0)
