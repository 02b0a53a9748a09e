"""A token table in the fewest bits: transform, integers, entropy coder, file."""

from pcagpt.coding.encode import Prepared, prepare
from pcagpt.coding.file import Description, read, to_bytes, write
from pcagpt.coding.limit import gaussian_limit
from pcagpt.coding.packed import PackedTable, estimated_packed_bytes, pack
from pcagpt.coding.packed_file import packed_bytes, read_packed, write_packed
from pcagpt.coding.search import at_step, estimated_bytes, within_bytes
from pcagpt.coding.table import CodedTable, InexactSums
from pcagpt.coding.weights import CODES_VERSION, loss_weighting
