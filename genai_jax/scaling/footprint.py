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
INTENSITY = 475.0  # g CO2e per kWh: world average, IEA, Global Energy & CO2 Status Report 2019


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
        f"{intensity:g} g CO2e per kWh"
        f"{' (world average of 2018, IEA)' if intensity == INTENSITY else ''}; "
        "without hosts and network"
    )
    return Footprint(energy, energy * intensity / 1000, method)


def measured(path: str) -> Footprint:
    """The sum of all rows in an ``emissions.csv`` of codecarbon.

    Raises:
      ConfigError: it cannot be read, or is not such a file.
    """
    label = f"--emissions={path}"
    energy = emissions = 0.0
    versions = set()
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path, label))))
        for row in rows:
            energy += _amount(row["energy_consumed"])
            emissions += _amount(row["emissions"])
            versions.add(str(row.get("codecarbon_version") or ""))
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError, csv.Error):
        rows = []
    if not rows:
        raise unreadable(
            path,
            "it is not an emissions.csv of codecarbon, with the columns energy_consumed (kWh) and "
            "emissions (kg CO2e)",
            label,
        )
    name = " ".join(["codecarbon", *sorted(filter(None, versions))])
    return Footprint(energy, emissions, f"measured by {name}, {len(rows)} row(s)")


def _amount(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(text)
    return value
