"""Optima of small cases, from solvers that know nothing of stages: fluid, and in steps."""

import itertools
import math
from collections import defaultdict

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linear_sum_assignment, linprog, milp
from scipy.sparse import coo_array, csr_array

from jaxserve.sharding.flash.cost import CostModel
from jaxserve.sharding.flash.decomposition import stuff


class _Rows:
    """Rows of a sparse matrix, filled entry by entry."""

    def __init__(self) -> None:
        self.entries: defaultdict[tuple[int, int], float] = defaultdict(float)
        self.numbers: dict[object, int] = {}

    def add(self, name: object, column: int, value: float) -> None:
        """Add to an entry of the row of a name."""
        row = self.numbers.setdefault(name, len(self.numbers))
        self.entries[row, column] += value

    def matrix(self, columns: int) -> csr_array:
        """Return the matrix."""
        places = np.array(list(self.entries)).reshape(-1, 2)
        return coo_array(
            (np.array(list(self.entries.values())), (places[:, 0], places[:, 1])),
            shape=(len(self.numbers), columns),
        ).tocsr()


def fluid_optimum(traffic: np.ndarray, cost: CostModel) -> float:
    """Return the least seconds if rows are a fluid and fixed times are none.

    A row may leave through any GPU of its server and enter through any of the other; each port, of
    four per GPU, carries so much per second. A linear programme.

    Args:
        traffic: `[n, m, n, m]`.
        cost: What links cost.
    """
    n, m = traffic.shape[:2]
    limits, flows = _Rows(), _Rows()
    amounts: list[float] = []
    column = 1
    for i, a, j, b in itertools.product(range(n), range(m), range(n), range(m)):
        amount = float(traffic[i, a, j, b])
        if not amount or (i, a) == (j, b):
            continue
        ways = [(a, b)] if i == j else list(itertools.product(range(m), range(m)))
        flow = len(amounts)
        amounts.append(1.0)
        for out, into in ways:
            flows.add(flow, column, 1.0)
            if i == j:
                hops = [("give", i, a), ("take", j, b)]
            else:
                hops = [("send", i, out), ("receive", j, into)]
                hops += [("give", i, a), ("take", i, out)] if out != a else []
                hops += [("give", j, into), ("take", j, b)] if into != b else []
            for hop in hops:
                rate = cost.out_rate if hop[0] in ("send", "receive") else cost.up_rate
                limits.add(hop, column, amount / rate)
            column += 1
    if not amounts:
        return 0.0
    for hop in list(limits.numbers):
        limits.add(hop, 0, -1.0)
    goal = np.zeros(column)
    goal[0] = 1.0
    found = linprog(
        goal, A_ub=limits.matrix(column), b_ub=np.zeros(len(limits.numbers)),
        A_eq=flows.matrix(column), b_eq=np.array(amounts), bounds=(0, None), method="highs",
    )  # fmt: skip
    assert found.success, found.message
    return float(found.fun)


def stepwise_optimum(traffic: np.ndarray, cost: CostModel, *, max_steps: int) -> float:
    """Return the least seconds of chunks in steps, relays through other servers included.

    A step is the time of a row through a port between servers. What is sent in a step arrives
    behind it, later by the whole steps of the fixed time. Inside servers rows move within a step,
    as many as a port carries in it. Both favour the optimum. A mixed-integer programme over time
    in the manner of TE-CCL, for a few GPUs and a dozen rows or so. Rows that stay in their server
    take no time here.

    Args:
        traffic: `[n, m, n, m]`, in rows that are not divided.
        cost: What links cost, per row.
        max_steps: Steps in which it can be done.
    """
    n, m = traffic.shape[:2]
    late = math.floor(cost.out_latency * cost.out_rate + 1e-9)
    inside = math.floor(cost.up_rate / cost.out_rate + 1e-9)
    gpus = list(itertools.product(range(n), range(m)))
    number = itertools.count(1)
    balance, ports, last = _Rows(), _Rows(), _Rows()
    upper: list[float] = [float(max_steps)]
    right: dict[object, float] = defaultdict(float)
    limit: dict[object, float] = {}

    def variable(most: float) -> int:
        upper.append(most)
        return next(number)

    for final in gpus:
        whole = float(sum(traffic[g][final] for g in gpus if g != final))
        if not whole:
            continue
        for t in range(max_steps + 1):
            for g in gpus:
                # What there is at the start, was held, or arrives, is held or sent.
                right[final, g, t] += float(traffic[g][final]) if t == 0 and g != final else 0.0
                held = variable(whole if t < max_steps or g == final else 0.0)
                balance.add((final, g, t), held, 1.0)
                if t < max_steps:
                    balance.add((final, g, t + 1), held, -1.0)
            for g, h in itertools.permutations(gpus, 2):
                is_across = g[0] != h[0]
                arrival = t + 1 + late if is_across else t
                if arrival > max_steps:
                    continue
                most = 1.0 if is_across else float(inside)
                flow = variable(most)
                balance.add((final, g, t), flow, 1.0)
                balance.add((final, h, arrival), flow, -1.0)
                for port in (("out", is_across, g, t), ("in", is_across, h, t)):
                    ports.add(port, flow, 1.0)
                    limit[port] = most
                if is_across:
                    last.add(flow, flow, float(arrival))
                    last.add(flow, 0, -1.0)
    columns = len(upper)
    if columns == 1:
        return 0.0
    start = [right[name] for name in balance.numbers]
    constraints = [
        LinearConstraint(balance.matrix(columns), start, start),
        LinearConstraint(ports.matrix(columns), -np.inf, [limit[p] for p in ports.numbers]),
        # A port between servers sends one row in a step at most, so that its flows are 0 or 1.
        LinearConstraint(last.matrix(columns), -np.inf, 0.0),
    ]
    goal = np.zeros(columns)
    goal[0] = 1.0
    found = milp(
        goal, constraints=constraints, integrality=np.ones(columns),
        bounds=Bounds(np.zeros(columns), np.array(upper)), options={"time_limit": 60},
    )  # fmt: skip
    assert found.status == 0, found.message
    return float(found.fun) / cost.out_rate


def scipy_stages(counts: np.ndarray) -> int:
    """Return how many stages a decomposition has that calls SciPy for each: the baseline in time.

    Matchings are of the largest sum of entries among the positive ones.
    """
    left = stuff(counts)
    n, stages = len(left), 0
    while left.any():
        worth = np.where(left > 0, left.astype(np.float64), -float(left.max()) * n)
        rows, columns = linear_sum_assignment(worth, maximize=True)
        amount = left[rows, columns].min()
        assert amount > 0
        left[rows, columns] -= amount
        stages += 1
    return stages
