"""Knobs: their declaration, their checks, and the command line that sets them."""

from pcagpt.config.checks import arms_of, check_stored, ranks_of, validate, words_of
from pcagpt.config.schema import KNOBS, Settings, base, override
