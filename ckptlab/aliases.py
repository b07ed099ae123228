"""Types that many modules speak of."""

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Shape = tuple[int, ...]
