"""Which order do the tensor cores serve two warpgroups in? Candidate policies, judged on recorded stamps.

Each policy takes jobs, one per warpgroup: (clock of each k-step's issue, tensor-core cycles of a k-step), and returns
the clock at which each warpgroup's last step leaves the tensor cores. Used by `tensor_cores.py`; needs no GPU.
"""

import numpy as np

ISSUE_TO_STAMP = 12  # a stamp is taken about this long after the step before it left the issue slot
TAIL = 62  # intercept of the solo fit: from the last step's end to the return of the wait, and the start-up


def fifo_by_step(jobs):
    """Steps run in the order in which they were issued, whichever warpgroup they belong to."""
    now, done = 0.0, {}
    for issued, place, cost in sorted((t, w, cost) for w, (times, cost) in enumerate(jobs) for t in times):
        now = max(now, issued) + cost
        done[place] = now
    return [done[w] for w in range(len(jobs))]


def _queues(jobs, choose):
    queues, now, done, last = [[(t, cost) for t in times] for times, cost in jobs], 0.0, {}, -1
    while any(queues):
        ready = [w for w, queue in enumerate(queues) if queue and queue[0][0] <= now]
        if not ready:
            now = min(queue[0][0] for queue in queues if queue)
            continue
        last = choose(ready, last, queues)
        now += queues[last].pop(0)[1]
        done[last] = now
    return [done[w] for w in range(len(jobs))]


def round_robin_by_step(jobs):
    """Warpgroups with an issued step take turns."""
    return _queues(jobs, lambda ready, last, queues: min(ready, key=lambda w: (w - last - 1) % len(queues)))


def whole_gemm_first(jobs):
    """A warpgroup keeps the tensor cores until its issued steps are done."""
    return _queues(jobs, lambda ready, last, queues: last if last in ready else min(ready, key=lambda w: queues[w][0][0]))


POLICIES = {
    "fifo_by_step": fifo_by_step,
    "round_robin_by_step": round_robin_by_step,
    "whole_gemm_first": whole_gemm_first,
}


def judge(contention, step_cycles):
    """Mean and worst |predicted - measured| return of the wait for each policy, over cases of at most 24 steps and
    over the rest.

    `contention` is the recorded table of `tensor_cores.py`; `step_cycles(label)` gives the cycles of one k-step of a
    role.
    """
    errors = {name: {"to_24_steps": [], "beyond": []} for name in POLICIES}
    for case, row in contention.items():
        kind, roles, _ = case.split()
        if kind != "steps":
            continue
        groups, costs = row["warpgroups"], [step_cycles(role) for role in roles.split("__")]
        jobs = [([t - ISSUE_TO_STAMP for t in g["issued"]], cost) for g, cost in zip(groups, costs, strict=True)]
        bin_name = "to_24_steps" if sum(len(g["issued"]) for g in groups) <= 24 else "beyond"
        for name, policy in POLICIES.items():
            predicted = np.array(policy(jobs)) + TAIL
            errors[name][bin_name] += list(np.abs(predicted - [g["waited"] for g in groups]))
    return {
        name: {b: {"mean": round(float(np.mean(e)), 1), "worst": round(float(np.max(e)), 1)} for b, e in bins.items()}
        for name, bins in errors.items()
    }
