"""Exercises of the first five notebooks: what is wrong with a reader's function, in words.

    check(halved, ((6,), 3, "The half of 6."), ((0,), 0, "Zero has a half as well."))
"""

import torch


def check(function, *cases):
    """Print that a function is right, not written yet (None or ... in the first case), or what is
    wrong with it. Nothing that it does is raised.

    cases: (arguments, expected, why) each, tried in order. expected: numbers or a tensor, to be met
    to six digits; or a function that says in words what is wrong with an answer, "" where nothing
    is. why: a sentence for whoever gets this case wrong.
    """
    for i, (arguments, expected, why) in enumerate(cases):
        try:
            found = function(*arguments)
            if (found is None or found is ...) and i == 0:
                print(f"{function.__name__}: not written yet")
                return
            fault = "it returns nothing" if found is None else ""
            if not fault:
                fault = expected(found) if callable(expected) else _fault(found, expected)
        except Exception as error:  # whatever the reader's lines raise
            fault = f"{type(error).__name__}: {error}"
        if fault:
            print(f"{function.__name__}: wrong, {fault}. {why}")
            return
    print(f"{function.__name__}: right")


def _fault(found, expected):
    found, expected = (torch.as_tensor(v, dtype=torch.float64) for v in (found, expected))
    if found.shape != expected.shape:
        return f"its shape is {[*found.shape]}, not {[*expected.shape]}"
    off = ~found.isclose(expected, rtol=1e-6, atol=1e-9)
    return f"{found[off][0]:.7g} where {expected[off][0]:.7g} is right" if off.any() else ""
