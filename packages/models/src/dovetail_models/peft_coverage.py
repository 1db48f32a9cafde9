"""Whether an adapter of `peft` is whole: the model has all that its configuration names, and all that has tensors."""

from collections.abc import Collection, Mapping, Sequence

from dovetail_models.peft_config import CONFIG, PeftConfig, named
from dovetail_models.peft_targets import Target
from dovetail_weights.errors import nearest

__all__ = ["check_complete", "check_names"]

SHOWN = 8
"""How many names a message lists."""


def check_names(config: PeftConfig, targets: Sequence[Target], heads: Collection[str]) -> None:
    """Check that something which a configuration names is there.

    Lists may have names for other models, too, as those that training programs put together; `check_complete` sees to
    the rest.

    Args:
        config: the adapter's.
        targets: all that the model has.
        heads: modules that unembed with an embedding.

    Raises:
        ValueError: none of the names of modules, or of parameters, fits one of the model, or a regular expression.
    """
    modules = {target.module for target in targets if target.parameter is None} | set(heads)
    parameters = {target.name for target in targets if target.parameter is not None}
    one = isinstance(config.modules, str)
    if one and not config.all_linear and not any(named(config.modules, module) for module in modules):
        raise ValueError(f"target_modules={config.modules!r} in {CONFIG} matches no module of the model")
    entries = [] if one else [entry for entry in config.modules if not named(config.excluded, entry)]
    _check_entries("target_modules", entries, modules)
    _check_entries("target_parameters", config.parameters, parameters)


def _check_entries(field: str, entries: Sequence[str], known: Collection[str]) -> None:
    if not entries or any(named((entry,), name) for entry in entries for name in known):
        return
    ends = {".".join(name.split(".")[-1 - entries[0].count(".") :]) for name in known}
    raise ValueError(
        f"{field} in {CONFIG} is {list(entries)}, with which no name in the model ends; the nearest to "
        f"{entries[0]!r} are: {nearest(entries[0], sorted(ends))}"
    )


def check_complete(
    found: Collection[str], config: PeftConfig, targets: Sequence[Target], heads: Mapping[str, str]
) -> None:
    """Check that everything which a configuration adapts has tensors.

    Args:
        found: modules with tensors.
        config: the adapter's.
        targets: all that the model has.
        heads: modules that unembed with an embedding, by the module of the embedding, whose tensors do for both.

    Raises:
        ValueError: a module or parameter has none.
    """
    expected = {target.name: {target.module} for target in targets if _adapted(config, target)}
    if not config.all_linear:
        expected |= {head: {head, module} for module, head in heads.items() if config.adapts(head)}
    lacking = [name for name, modules in expected.items() if modules.isdisjoint(found)]
    if lacking:
        more = f" and {len(lacking) - SHOWN} more" if lacking[SHOWN:] else ""
        raise ValueError(
            f"{len(lacking)} of {len(expected)} modules that {CONFIG} adapts have no tensors: "
            f"{', '.join(lacking[:SHOWN])}{more}; expected A and B of each: is the file whole, and for this model?"
        )


def _adapted(config: PeftConfig, target: Target) -> bool:
    address = target.parts[0].address
    if address.startswith("ahead/"):  # transformers leaves out heads that look further ahead
        return False
    if target.parameter is not None:
        return config.adapts_parameter(target.name)
    linear = not target.table and address.rpartition("/")[2] != "head"
    return config.adapts(target.module) and (linear or not config.all_linear)
