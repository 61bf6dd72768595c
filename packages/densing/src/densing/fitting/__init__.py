"""Fitting scaling laws: robust, from many starts, thousands of resamples at once, and how firm.

A module of its own: nothing here knows what density is. float64 throughout.

    form     what is fitted (`PowerLaw`, `Sigmoid`, `Line`), with its analytic gradient
    fit      the best constants, from a screened grid of starts
    bootstrap, profile, identify, hold_out     how much of it the data support
"""

from densing.fitting.bootstrap import Bootstrap, bootstrap, resample
from densing.fitting.fit import Fit, fit
from densing.fitting.forms import Form, Line, form_from_dict
from densing.fitting.holdout import HoldOut, hold_out
from densing.fitting.identify import Flag, Interval, identify, profile
from densing.fitting.power_law import PowerLaw
from densing.fitting.sigmoid import Sigmoid

__all__ = [
    "Bootstrap",
    "Fit",
    "Flag",
    "Form",
    "HoldOut",
    "Interval",
    "Line",
    "PowerLaw",
    "Sigmoid",
    "bootstrap",
    "fit",
    "form_from_dict",
    "hold_out",
    "identify",
    "profile",
    "resample",
]
