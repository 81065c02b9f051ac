"""Ledgers count every call once, whoever counts at the same time."""

import gc
import threading
import time

import lpattn
from lpattn import Choice, Provenance, Reason
from lpattn.ledger import Ledger, find_ledger

SLOW = Reason("not_faster", "x0.50 expected")


class Yielding(dict):
    """Lets another thread run between the reading and the writing of a count."""

    def get(self, key, default=None):
        value = super().get(key, default)
        time.sleep(1e-6)
        return value


def in_threads(count, work):
    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_counts():
    ledger = Ledger()
    ledger.count(Choice("one", Provenance.MODEL))
    ledger.count(Choice("two", Provenance.LAYER_RULE))
    ledger.count(Choice("one", Provenance.MODEL))
    ledger.count(Choice("bf16_reference", Provenance.AUTOMATIC, exact_reason=SLOW))
    ledger.count_exact(Reason("not_faster", "x0.70 expected"))
    assert ledger.low == {"one": 2, "two": 1}
    assert ledger.exact == {"not_faster": 2}
    assert ledger.details == {"not_faster": Reason("not_faster", "x0.70 expected")}
    assert ledger.provenance is Provenance.AUTOMATIC
    assert ledger.total == 5


def test_clearing():
    ledger = Ledger()
    ledger.count(Choice("one", Provenance.MODEL))
    ledger.count_exact(SLOW)
    ledger.rope = "fused"
    ledger.clear()
    assert (ledger.low, ledger.exact, ledger.details) == ({}, {}, {})
    assert (ledger.rope, ledger.provenance, ledger.total) == (None, None, 0)


def test_no_count_is_lost_between_threads():
    ledger = Ledger()
    ledger.low, ledger.exact = Yielding(), Yielding()
    choices = [
        Choice("one", Provenance.MODEL),
        Choice("two", Provenance.MODEL),
        Choice("bf16_reference", Provenance.MODEL, exact_reason=SLOW),
        Choice("bf16_reference", Provenance.MODEL, exact_reason=Reason("head_dim", "head_dim 80")),
    ]

    def work(index):
        for n in range(200):
            ledger.count(choices[n % 4])

    in_threads(4, work)
    assert ledger.low == {"one": 200, "two": 200}
    assert ledger.exact == {"not_faster": 200, "head_dim": 200}
    assert ledger.total == 800


def test_calls_of_a_model_in_many_threads(add_backend, make_model, qkv):
    fake = add_backend()
    model = lpattn.apply_low_precision_attention(make_model(), "fake")
    x = qkv()[0]
    in_threads(4, lambda index: [model(x) for _ in range(50)])
    assert lpattn.attention_report(model)["attn"].low == {"fake": 200}
    assert len(fake.calls) == 200


def test_ids_are_never_shared():
    ids = []

    def work(index):
        ids.extend(Ledger().id for _ in range(200))

    in_threads(4, work)
    assert len(set(ids)) == 800


def test_a_ledger_is_found_while_it_lives():
    ledger = Ledger()
    number = ledger.id
    assert find_ledger(number) is ledger
    del ledger
    gc.collect()
    assert find_ledger(number) is None
