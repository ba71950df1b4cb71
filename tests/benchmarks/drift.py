"""How often a drift report raises an alarm: without drift, and with a number moved by parts of its deviation.

PYTHONPATH=. python tests/benchmarks/drift.py [REPORTS]

100 reports take a minute or two, and tell a rate of 5 % from one of 12.
"""

import sys

import numpy as np

from deepfake_utils.serving import drift
from tests.test_drift import draw

N_REPORTS = int(sys.argv[1]) if len(sys.argv) > 1 else 100
SIZES = ((150, 80), (1000, 500))  # recordings of the reference, and of the stream
SHIFTS = (0.1, 0.2, 0.3, 0.5)  # of a standard deviation of the level

rng = np.random.default_rng(0)
deviation = draw(rng, 10_000)["level_db"].std()
print("% of reports with an alarm without drift, at 1, 5 and 20 %; % that name the level at 1 %, moved by", SHIFTS)
for n_reference, n in SIZES:
    still = [drift.find_drift(draw(rng, n_reference), draw(rng, n))["p"].min() for _ in range(N_REPORTS)]
    alarms = [100 * np.mean(np.array(still) < rate) for rate in (0.01, 0.05, 0.2)]
    named = []
    for shift in SHIFTS:
        reports = [
            drift.find_drift(draw(rng, n_reference), draw(rng, n, level_db=shift * deviation)).set_index("what")
            for _ in range(N_REPORTS // 5)
        ]
        named.append(100 * np.mean([report["drifted"]["level"] for report in reports]))
    print(f"{n_reference:>5} against {n:<5}", *(f"{x:8.1f}" for x in alarms), "  |", *(f"{x:8.1f}" for x in named))
