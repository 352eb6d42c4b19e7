"""Frozen dataclasses <-> plain absl flags named ``--component.field``.

A component is a frozen dataclass whose fields are declared with `field`. `parse` turns a command
line, flagfiles included, into a `Config`; `Config.to_flags` turns it back into a flagfile that
reproduces it. Nothing here touches the global ``absl.flags.FLAGS``, so a notebook can parse twice.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from genai_jax.errors import ConfigError as ConfigError  # where everything imports it from
from genai_jax.errors import MissingFile as MissingFile
from genai_jax.files import expand_home
from genai_jax.flagfiles import expand_flagfiles, flag_line
from genai_jax.outside import is_outside

HELP = {"--help", "-h", "--helpfull"}
LARGEST_FLOAT = (2 - 2**-23) * 2.0**127  # of float32, in which flags are used
SMALLEST_FLOAT = 2.0**-149  # what is closer to 0 would be 0
LARGEST_INT = 2**31 - 1  # of a flag that names no maximum: sizes and counts of arrays


def field(
    default: Any,
    help: str,  # the word absl uses
    *,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    changeable: bool = False,
    within_run: bool = False,
    path: bool = False,
    run: bool = False,
    at_use: tuple[str, ...] = (),
    outside: Callable[[str | None], tuple[str, ...]] | None = None,
) -> Any:
    """Declares one field of a component.

    Args:
      default: the value when no flag sets it.
      help: one line for ``--help``.
      choices: the allowed strings.
      minimum: inclusive lower bound of a number.
      maximum: inclusive upper bound of a number.
      changeable: whether a run may be resumed with a different value (a mesh, a log interval).
      within_run: whether it is a number of steps that a shorter run cuts, which is then said.
      path: whether it names a file or folder, in which ~ stands for the home folder.
      run: whether that is the workdir of a run whose flags this run needs to be sampled.
      at_use: the commands, of sample and evaluate, that may use a trained run with another value.
      outside: for a flag that may name code outside this project: value -> the names of such code
        in it. Beside `choices`, such a name is allowed.
    """
    metadata = dict(
        help=help, choices=choices, minimum=minimum, maximum=maximum, changeable=changeable,
        within_run=within_run, path=path or run, run=run, at_use=at_use, outside=outside,
    )  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """The resolved flags of a run: ``config.run.seed``, ``config.transformer.num_layers``.

    The component ``run`` holds the flags that have no prefix. `defaults` holds components that have
    no flags in this run: its task does not use them, but shared code may read them. `kept` has the
    copies, in the workdir of a run that is only read, of what some of its flags name: flag -> path.
    """

    components: Mapping[str, Any]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kept: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        for components in ("components", "defaults"):
            if name in self.__dict__.get(components, {}):
                return self.__dict__[components][name]
        raise AttributeError(f"no component {name!r} in this configuration")

    def replace(self, component: str, **changes: Any) -> "Config":
        """Returns a copy with some fields of one component changed."""
        changed = dataclasses.replace(self.components[component], **changes)
        return dataclasses.replace(self, components={**self.components, component: changed})

    def items(self) -> dict[str, Any]:
        """Flag name -> value, for every field."""
        return {
            flag_name(component, f.name): getattr(value, f.name)
            for component, value in self.components.items()
            for f in dataclasses.fields(value)
        }

    def to_flags(self, *, leave_out: Sequence[str] = ()) -> str:
        """Returns a flagfile that sets every field except those named in `leave_out`."""
        lines = []
        for name, value in self.items().items():
            if name in leave_out or value is None:
                continue
            text = str(value).lower() if isinstance(value, bool) else str(value)
            lines.append(flag_line(name, text))
        return "\n".join(lines) + "\n"

    def changeable(self) -> set[str]:
        """Names of the flags that may differ when a run is resumed."""
        return self._marked("changeable")

    def names_run(self) -> set[str]:
        """Names of the flags whose values are workdirs of runs that this one builds on."""
        return self._marked("run")

    def place_of(self, flag: str) -> str:
        """The path that a flag names, or the copy of it that the run kept."""
        return self.kept.get(flag) or self.items()[flag]

    def within_run(self) -> set[str]:
        """Names of the flags that are numbers of steps within the run."""
        return self._marked("within_run")

    def outside(self) -> tuple[str, ...]:
        """The code outside this project that flags other than ``--task`` name."""
        values = self.items()
        fields = [
            (values[flag_name(component, f.name)], f.metadata["outside"])
            for component, value in self.components.items()
            for f in dataclasses.fields(value)
        ]
        return tuple(dict.fromkeys(n for x, names in fields if names for n in names(x)))

    def _marked(self, mark: str) -> set[str]:
        return {
            flag_name(component, f.name)
            for component, value in self.components.items()
            for f in dataclasses.fields(value)
            if f.metadata[mark]
        }


def parse(
    argv: Sequence[str],
    components: Mapping[str, type],
    user: str = "this command",
    defaults: Mapping[str, Any] | None = None,
) -> tuple[Config, set[str]]:
    """Parses a command line (without the program's name).

    Args:
      argv: the arguments; ``--flagfile=PATH`` is replaced by the lines of that file.
      components: name -> dataclass; the name ``run`` gives flags without a prefix.
      user: what the flags belong to, named in the error about an unknown flag.
      defaults: see `Config`.

    Returns:
      The configuration, and the names of the flags that were set.

    Raises:
      ConfigError: an unknown flag, a value of the wrong type or out of range, a bad flagfile.
    """
    values = _define(components)
    try:
        rest = values(["program", *expand_flagfiles(argv)])[1:]
    except flags.UnrecognizedFlagError as error:
        raise ConfigError(_unknown(error.flagname, components, user)) from None
    except flags.Error as error:
        raise ConfigError(_in_english(" ".join(str(error).split()))) from None
    if rest:
        raise ConfigError(f"argument {rest[0]!r} is not a flag; flags look like --name=value")
    read = {name: _read(values, name, cls) for name, cls in components.items()}
    config = Config(read, defaults or {})
    return config, {name for name in config.items() if values[name].present}


def _in_english(message: str) -> str:
    """An error of absl, without the words of Python in it."""
    for words, ours in (
        (r"invalid literal for int\(\) with base 10: .*", "it is not a whole number"),
        (r"could not convert string to float: .*", "it is not a number"),
        (r"\('Non-boolean argument to boolean flag', .*\)", "it is neither true nor false"),
        (r"is not an? non-negative (number|integer)$", r"is not \1 >= 0"),
        (r"is not an? (number|integer) in the range \[(.*), (.*)\]$", r"is not a \1 from \2 to \3"),
        (r"is not (number|integer) >= (.*)$", r"is not a \1 of at least \2"),
        (r"is not (number|integer) <= (.*)$", r"is not a \1 of at most \2"),
        (r"is not a integer (.*)$", r"is not a whole number \1"),
    ):
        message = re.sub(words, ours, message)
    return message


def _unknown(name: str, components: Mapping[str, type], user: str) -> str:
    """The error message for a flag that does not exist."""
    names = [flag_name(c, f.name) for c, cls in components.items() for f in dataclasses.fields(cls)]
    component = name.rpartition(".")[0]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
    for means in (str.__eq__, _is_short):
        near = near or [n for n in names if means(n.rpartition(".")[2], name)][:1]
    same = sorted(n for n in names if component and n.rpartition(".")[0] == component)
    if near:
        hint = f"did you mean --{near[0]}?"
    elif same:
        hint = f"its {component} flags are {', '.join(f'--{n}' for n in same)}"
    else:
        prefixed = [f"--{c}.*" for c in components if c != "run"]
        plain = [n for n in names if "." not in n]
        hint = f"its flags are {', '.join([f'--{n}' for n in plain] + prefixed)}"
    return f"--{name} is not a flag of {user}; {hint}"


def _is_short(last: str, name: str) -> bool:
    """Whether a name is the initials, or the first words, of the last part of a flag."""
    return name == "".join(word[:1] for word in last.split("_")) or last.startswith(f"{name}_")


def last_value(argv: Sequence[str], name: str) -> str | None:
    """The last value of a string flag in a command line without flagfiles; None if not set.

    A leading ~ is expanded; only paths begin with it.
    """
    value, arguments = None, iter(argv)
    for argument in arguments:
        flag, equals, text = argument.partition("=")
        if flag in (f"--{name}", f"-{name}"):
            value = text if equals else next(arguments, None)
    return value and expand_home(value)


def refuse_set(component: str, config: Any, names: Sequence[str], why: str):
    """Raises `ConfigError` if one of the fields `names` of a component has been set.

    Args:
      component: its name, as in ``--component.name``.
      config: the dataclass.
      names: the fields that have no effect.
      why: the end of the line, such as "applies only to GPUs".
    """
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for name in names:
        if (value := getattr(config, name)) != defaults[name]:
            raise ConfigError(f"--{flag_name(component, name)}={value} {why}")


def flag_names(components: Mapping[str, type]) -> set[str]:
    """The names of all flags of the components, without the dashes."""
    return {flag_name(c, f.name) for c, cls in components.items() for f in dataclasses.fields(cls)}


def _shown(default: Any) -> str:
    return {"": "empty", None: "unset"}.get(default, str(default))


def asks_for_help(argv: Sequence[str]) -> bool:
    return not HELP.isdisjoint(argv)


def help_text(usage: str | None, components: Mapping[str, type]) -> str:
    """All flags with their defaults and allowed values, grouped by component."""
    lines = [usage or "", ""]  # no docstrings under python -OO
    for component, cls in components.items():
        for f in dataclasses.fields(cls):
            notes = [f"default {_shown(f.default)}"]
            if f.metadata["choices"]:
                own = "|module:Name" if f.metadata["outside"] else ""
                notes.append(f"one of {'|'.join(f.metadata['choices'])}{own}")
            if f.metadata["minimum"] is not None:
                notes.append(f"at least {f.metadata['minimum']}")
            if f.metadata["maximum"] is not None:
                notes.append(f"at most {f.metadata['maximum']}")
            name = flag_name(component, f.name)
            sentence = f.metadata["help"].removesuffix(".")
            lines.append(f"  --{name}\n      {sentence} ({'; '.join(notes)})")
        lines.append("")
    lines.append(
        "  --flagfile\n      A file with one flag per line; # starts a comment; files may nest;\n"
        '      --name:="a\\n" sets a flag to a JSON string'
    )
    return "\n".join(lines)


def _read(values: flags.FlagValues, component: str, cls: type) -> Any:
    fields = {f.name: values[flag_name(component, f.name)].value for f in dataclasses.fields(cls)}
    for f in dataclasses.fields(cls):
        if f.metadata["path"] and fields[f.name]:
            fields[f.name] = expand_home(fields[f.name])
        if f.metadata["outside"] and f.metadata["choices"]:
            _check_choice(flag_name(component, f.name), fields[f.name], f.metadata["choices"])
    try:
        return cls(**fields)
    except ValueError as error:  # fields that contradict each other
        raise ConfigError(name_flags(str(error), component, cls)) from None


def _check_choice(flag: str, value: str, choices: Sequence[str]):
    """Raises `ConfigError` for neither a choice nor code outside this project."""
    if value in choices or is_outside(value):
        return
    near = difflib.get_close_matches(value, choices, n=1)
    raise ConfigError(
        f"--{flag}={value} is not one of {', '.join(choices)}"
        f"{f' (did you mean {near[0]}?)' if near else ''}; name one of your own as "
        "my_package.my_module:Name"
    )


def name_flags(message: str, component: str, cls: type) -> str:
    """Rewrites `field` in backticks, and field=, in a message as the flags of a component."""
    names = "|".join(re.escape(f.name) for f in dataclasses.fields(cls))
    if not names:
        return message
    prefix = "--" + flag_name(component, "")
    message = re.sub(rf"`({names})`", rf"{prefix}\1", message)
    return re.sub(rf"(?<![\w.-])({names})=", rf"{prefix}\1=", message)


def flag_name(component: str, name: str) -> str:
    """The name of the flag of a field, without dashes."""
    return name if component == "run" else f"{component}.{name}"


def _define(components: Mapping[str, type]) -> flags.FlagValues:
    values = flags.FlagValues()
    for component, cls in components.items():
        for f in dataclasses.fields(cls):
            _define_flag(values, flag_name(component, f.name), f)
    return values


def _define_flag(values: flags.FlagValues, name: str, f: dataclasses.Field) -> None:
    kind, meta = plain_type(f.type), f.metadata
    common = dict(help=meta["help"], flag_values=values)
    largest = LARGEST_INT if kind is int and meta["maximum"] is None else meta["maximum"]
    bounds = dict(lower_bound=meta["minimum"], upper_bound=largest)
    if meta["choices"] and not meta["outside"]:
        flags.DEFINE_enum(name, f.default, list(meta["choices"]), **common)
    elif kind is bool:
        flags.DEFINE_boolean(name, f.default, **common)
    elif kind is int:
        flags.DEFINE_integer(name, f.default, **bounds, **common)
    elif kind is float:
        flags.DEFINE_float(name, f.default, **bounds, **common)
        number = lambda x: not x or SMALLEST_FLOAT <= abs(x) <= LARGEST_FLOAT
        flags.register_validator(name, number, "must be a finite number of float32", values)
    elif kind is str:
        flags.DEFINE_string(name, f.default, **common)
    else:
        raise TypeError(f"--{name}: a field of type {f.type} cannot be a flag")


def plain_type(annotation: Any) -> type:
    """``int`` for ``int`` and for ``int | None``."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        (annotation,) = (a for a in typing.get_args(annotation) if a is not type(None))
    return annotation


def overrides(cls: type) -> type:
    """A dataclass with the fields of `cls`, all unset, for a command that may override some."""
    unset = [
        (f.name, plain_type(f.type) | None, dataclasses.field(default=None, metadata=f.metadata))
        for f in dataclasses.fields(cls)
    ]
    return dataclasses.make_dataclass(f"{cls.__name__}Overrides", unset, frozen=True)


def override(value: Any, request: Any) -> Any:
    """Returns `value` with the fields that `request` sets; its class derives from `overrides`.

    Raises:
      ConfigError: fields that contradict each other.
    """
    names = [f.name for f in dataclasses.fields(value)]
    changes = {n: getattr(request, n) for n in names if getattr(request, n) is not None}
    try:
        return dataclasses.replace(value, **changes)
    except ValueError as error:
        raise ConfigError(str(error)) from None
