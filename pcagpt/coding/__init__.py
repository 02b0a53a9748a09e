"""A token table in the fewest bits: transform, integers, entropy coder, file."""

from pcagpt.coding.encode import Prepared, prepare
from pcagpt.coding.file import Description, file_bytes, read, to_bytes, write
from pcagpt.coding.limit import gaussian_limit
from pcagpt.coding.payload import to_words
from pcagpt.coding.search import Encoded, at_step, within_bytes, within_loss
from pcagpt.coding.table import CodedTable
from pcagpt.coding.weights import loss_weighting
