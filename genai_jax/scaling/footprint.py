"""What a training run cost: device hours, energy, and emissions, by stated factors or as measured.

Energy is device hours times the power of a device, times the overhead of the data center; emissions
are energy times the carbon intensity of the electricity (Patterson et al. 2021, "Carbon Emissions
and Large Neural Network Training", section 2).
"""

import csv
import io
import math
import re
from typing import NamedTuple

from genai_jax.errors import ConfigError
from genai_jax.files import read_text, unreadable

# Watts of one jax device, by a pattern of `device_kind`; the first match counts. TPU: "Measured
# min/mean/max power" on the pages "TPU v3" and "TPU v4" of the Cloud TPU documentation, the mean (a
# v3 chip of 220 W is two devices); none is published for later chips. NVIDIA: maximum power on the
# data sheets, SXM.
DEVICE_WATTS = (
    ("TPU v3", 110.0, "mean measured power, Cloud TPU documentation"),
    ("TPU v4", 170.0, "mean measured power, Cloud TPU documentation"),
    ("B200", 1000.0, "maximum power, NVIDIA data sheet"),
    ("H200", 700.0, "maximum power, NVIDIA data sheet"),
    ("H100", 700.0, "maximum power, NVIDIA data sheet"),
    ("A100", 400.0, "maximum power, NVIDIA data sheet"),
)
OVERHEAD = 1.57  # PUE: average of large data centers, Uptime Institute, Global Survey 2021
INTENSITY = 475.0  # g CO2 per kWh: world average, IEA, Global Energy & CO2 Status Report 2019


class Footprint(NamedTuple):
    """Energy and emissions of a run.

    Attributes:
      kilowatt_hours: energy.
      kilograms: of CO2 equivalent.
      method: the factors and their sources, or the program that measured it, in one sentence.
    """

    kilowatt_hours: float
    kilograms: float
    method: str


def watts_of(kind: str) -> tuple[float, str] | None:
    """Power of one device in watts and its source; None if it is not known."""
    for name, watts, source in DEVICE_WATTS:
        if re.search(rf"\b{name}\b", kind, re.IGNORECASE):
            return watts, source
    return None


def by_factors(
    hours: float, watts: float, source: str, overhead: float, intensity: float
) -> Footprint:
    """The footprint of device hours.

    Args:
      hours: device hours.
      watts: power of one device.
      source: of that number.
      overhead: power usage effectiveness (PUE), energy of the data center per energy of devices.
      intensity: carbon intensity of the electricity, in g CO2e per kWh.
    """
    energy = hours * watts / 1000 * overhead
    method = (
        f"{hours:.4g} device hours x {watts:g} W ({source}) x {overhead:g} (overhead of the data "
        f"center, PUE{'; average of 2021, Uptime Institute' if overhead == OVERHEAD else ''}) x "
        f"{intensity:g} g CO2 per kWh"
        f"{' (world average of 2018, IEA)' if intensity == INTENSITY else ''}; "
        "without hosts and network"
    )
    return Footprint(energy, energy * intensity / 1000, method)


def measured(path: str) -> Footprint:
    """The sum over all measurements in an ``emissions.csv`` of codecarbon.

    The file may have several rows for one measurement, of which each includes those before it, and
    measurements of several processes or restarts of a run, which add up.

    Raises:
      ConfigError: it cannot be read, or is not such a file.
    """
    label = f"--emissions={path}"
    energy = emissions = 0.0
    last: dict[str, dict] = {}  # run_id -> its newest row
    try:
        for i, row in enumerate(csv.DictReader(io.StringIO(read_text(path, label)))):
            last[str(row.get("run_id") or i)] = row
        for row in last.values():
            energy += _amount(row["energy_consumed"])
            emissions += _amount(row["emissions"])
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError, csv.Error):
        last = {}
    if not last:
        raise unreadable(
            path,
            "it is not an emissions.csv of codecarbon, with the columns energy_consumed (kWh) and "
            "emissions (kg CO2e)",
            label,
        )
    versions = {str(row.get("codecarbon_version") or "") for row in last.values()}
    projects = {str(row.get("project_name") or "") for row in last.values()}
    method = " ".join(["measured by codecarbon", *sorted(filter(None, versions))])
    if len(last) > 1:
        method += f", the sum of {len(last)} measurements"
    if len(projects) > 1:
        method += f" of the projects {', '.join(sorted(filter(None, projects)))}"
    return Footprint(energy, emissions, method)


def _amount(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(text)
    return value
