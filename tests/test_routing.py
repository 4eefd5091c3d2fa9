"""Distributions keep their sum, shape and seed; routing agrees with its definition."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexperts.routing import (
    RECORDED,
    Distribution,
    even,
    from_file,
    hot,
    log_normal,
    parse_distribution,
    recorded,
    resample,
    route,
    zipf,
)

INT32_MAX = 2**31 - 1
# Empty experts, small ones and a heavy tail.
COUNTS = st.lists(st.one_of(st.just(0), st.integers(0, 40), st.integers(0, 3000)), min_size=1, max_size=64)
EXPERTS = st.integers(1, 96)
ROWS = st.integers(0, 5000)
SEEDS = st.integers(0, 2**32)
fuzz = settings(deadline=None, max_examples=150)


def dist_of(counts: list[int]) -> Distribution:
    return Distribution("test", tuple(counts), "made by a test")


def peak(dist: Distribution) -> float:
    return dist.max_tokens * dist.num_experts / dist.total_tokens


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1 and len(message) < 300, message
    return message


def largest_remainder(weights: list[int], total: int, cap: int | None = None) -> list[int]:
    """The definition, in fractions: cap every share that is too large, until none is; then round."""
    counts = [0] * len(weights)
    free = {e for e, w in enumerate(weights) if w}
    left = total
    while free:
        sum_free = sum(weights[e] for e in free)
        over = {e for e in free if cap is not None and Fraction(weights[e] * left, sum_free) >= cap}
        if not over:
            break
        for e in over:
            counts[e] = cap or 0
        left -= len(over) * (cap or 0)
        free -= over
    share = {e: Fraction(weights[e] * left, sum(weights[e] for e in free)) for e in free}
    for e in free:
        counts[e] = math.floor(share[e])
    missing = total - sum(counts)
    for e in sorted(free, key=lambda e: (counts[e] - share[e], e))[:missing]:
        counts[e] += 1
    return counts


class TestDistribution:
    def test_properties(self) -> None:
        dist = dist_of([3, 0, 5, 0])
        assert (dist.num_experts, dist.total_tokens, dist.active_experts, dist.max_tokens) == (4, 8, 2, 5)
        assert dist.scaled is None

    def test_tensor(self) -> None:
        tensor = dist_of([3, 0, 5]).tensor()
        assert tensor.dtype == torch.int32 and tensor.device.type == "cpu"
        assert tensor.tolist() == [3, 0, 5]

    def test_is_a_value(self) -> None:
        dist = dist_of([1, 2])
        assert hash(dist) == hash(dist_of([1, 2])) and dist == dist_of([1, 2])
        with pytest.raises(dataclasses.FrozenInstanceError):
            dist.name = "other"  # type: ignore[misc]

    def test_a_list_becomes_a_tuple(self) -> None:
        assert Distribution("test", [1, 2], "test").counts == (1, 2)  # type: ignore[arg-type]

    def test_all_zero_and_the_largest_sum_are_allowed(self) -> None:
        assert dist_of([0, 0]).total_tokens == 0
        assert dist_of([INT32_MAX - 1, 1]).tensor().tolist() == [INT32_MAX - 1, 1]

    @pytest.mark.parametrize(
        ("counts", "says"),
        [
            ([], "counts is empty; expected at least one expert"),
            ([1, -2], "counts[1] is -2; expected a non-negative integer"),
            ([True], "counts[0] is True; expected a non-negative integer"),
            ([1.0], "counts[0] is 1.0; expected a non-negative integer"),
            (["7"], "counts[0] is '7'; expected a non-negative integer"),
            ([INT32_MAX, 1], "counts sums to 2147483648; expected at most 2147483647 (int32)"),
        ],
    )
    def test_bad_counts(self, counts: list[int], says: str) -> None:
        assert error_of(lambda: dist_of(counts)) == f"Distribution: {says}."

    @pytest.mark.parametrize("name", ["", "  ", "two\nlines", 5])
    def test_bad_name(self, name: str) -> None:
        assert error_of(lambda: Distribution(name, (1,), "test")).startswith("Distribution: name is ")
        assert error_of(lambda: Distribution("test", (1,), name)).startswith("Distribution: source is ")


class TestHot:
    def test_one_expert_has_its_share(self) -> None:
        dist = hot(0.6, 64, 2048, seed=3)
        assert sorted(dist.counts)[-1] == 1229 and dist.total_tokens == 2048 and dist.scaled is None
        assert set(sorted(dist.counts)[:-1]) == {13}
        assert hot(0.6, 64, 2048, seed=3) == dist != hot(0.6, 64, 2048, seed=4)
        assert parse_distribution("hot", num_experts=64, total_tokens=2048, seed=3) == dist
        assert parse_distribution("hot:0.25", num_experts=4, total_tokens=8).counts == (2, 2, 2, 2)

    def test_all_rows(self) -> None:
        assert sorted(hot(1, 4, 7).counts) == [0, 0, 0, 7] and hot(1, 1, 7).counts == (7,)

    def test_a_cap_holds_it(self) -> None:
        dist = hot(0.6, 64, 2048, max_per_expert=256)
        assert (
            dist.max_tokens == 256
            and dist.scaled == "hot:0.6 with at most 256 rows per expert, the excess spread over the others"
        )

    @pytest.mark.parametrize("share", [0.1, 1.5, 0.0])
    def test_bad_share(self, share: float) -> None:
        assert error_of(lambda: hot(share, 4, 8)) == f"hot: share is {share}; expected 1/E to 1, with E = 4."


class TestRecorded:
    def test_autoround_256(self) -> None:
        dist = recorded()
        assert (dist.name, dist.num_experts, dist.total_tokens) == ("autoround-256", 256, 31440)
        assert (dist.active_experts, dist.counts.count(0), dist.max_tokens) == (238, 18, 2491)
        assert sum(n > 256 for n in dist.counts) == 37
        assert dist.counts[:5] == (6, 33, 106, 281, 10) and dist.counts[-2:] == (178, 10)
        assert "AutoRound" in dist.source and "Apache-2.0" in dist.source and dist.scaled is None

    def test_all_shipped_ones_load_under_their_name(self) -> None:
        assert "autoround-256" in RECORDED
        assert [recorded(name).name for name in RECORDED] == RECORDED

    @pytest.mark.parametrize("name", ["nope", "../secrets", ""])
    def test_unknown(self, name: str) -> None:
        assert error_of(lambda: recorded(name)) == (
            f"recorded: {name!r} is not shipped; expected one of: {', '.join(RECORDED)}."
        )


class TestSynthetic:
    def test_even(self) -> None:
        assert even(3, 8).counts == (3, 3, 2)
        assert even(4, 0).counts == (0, 0, 0, 0)
        assert even(4, 8, max_per_expert=2).counts == (2, 2, 2, 2)

    def test_literal_values_for_a_seed(self) -> None:
        assert zipf(1.2, 8, 100, seed=1).counts == (43, 8, 5, 6, 4, 11, 4, 19)
        assert log_normal(1.5, 8, 100, seed=1).counts == (53, 7, 3, 4, 1, 11, 1, 20)
        assert zipf(1.2, 8, 100, seed=1, max_per_expert=20).counts == (20, 13, 8, 10, 6, 18, 5, 20)

    def test_zipf_follows_its_law(self) -> None:
        weights = [1 / rank for rank in range(1, 257)]
        counts = sorted(zipf(1, 256, 10**6).counts, reverse=True)
        assert all(abs(n - 10**6 * w / sum(weights)) <= 1 for n, w in zip(counts, weights, strict=True))

    def test_log_normal_has_its_sigma(self) -> None:
        counts = sorted(log_normal(1.5, 1001, 10**9).counts)
        above, median = counts[round(0.8413 * 1001)], counts[500]
        assert above / median == pytest.approx(math.exp(1.5), rel=0.01)
        assert counts[-1] * counts[0] == pytest.approx(median**2, rel=0.01)

    @pytest.mark.parametrize("make", [zipf, log_normal])
    def test_zero_is_even_and_a_seed_only_reorders(self, make: Callable[..., Distribution]) -> None:
        assert sorted(make(0, 7, 100).counts) == sorted(even(7, 100).counts)
        first, second = make(1.1, 32, 1000, seed=1), make(1.1, 32, 1000, seed=2)
        assert first.counts != second.counts and sorted(first.counts) == sorted(second.counts)

    @pytest.mark.parametrize("make", [zipf, log_normal])
    def test_extreme_parameters(self, make: Callable[..., Distribution]) -> None:
        assert sorted(make(1e308, 4, 10).counts) == [0, 0, 0, 10]
        assert make(1e308, 1, INT32_MAX).counts == (INT32_MAX,)
        assert sorted(make(1e308, 4, 10, max_per_expert=4).counts) == [2, 2, 2, 4]

    def test_names_parse_back(self) -> None:
        for dist in (even(8, 100), zipf(1.25, 8, 100, 3), zipf(2, 8, 100, 3), log_normal(0.5, 8, 100, 3)):
            assert parse_distribution(dist.name, num_experts=8, total_tokens=100, seed=3) == dist

    def test_says_when_the_cap_binds(self) -> None:
        assert zipf(1.2, 8, 100, max_per_expert=50).scaled is None
        scaled = zipf(1.2, 8, 100, max_per_expert=20).scaled
        assert scaled == "zipf:1.2 with at most 20 rows per expert, the excess spread over the others"

    @given(st.floats(0, 6), EXPERTS, ROWS, SEEDS, st.integers(1, 8), st.sampled_from([zipf, log_normal]))
    @fuzz
    def test_sum_cap_and_seed(
        self, value: float, experts: int, rows: int, seed: int, top_k: int, make: Callable[..., Distribution]
    ) -> None:
        cap = max(math.ceil(rows / top_k), math.ceil(rows / experts))
        dist = make(value, experts, rows, seed, max_per_expert=cap)
        assert (dist.num_experts, dist.total_tokens) == (experts, rows)
        assert dist.max_tokens <= cap
        assert dist == make(value, experts, rows, seed, max_per_expert=cap)
        free = make(value, experts, rows, seed)
        assert (dist.counts == free.counts) == (free.max_tokens <= cap) == (dist.scaled is None)

    @pytest.mark.parametrize(
        ("call", "says"),
        [
            (lambda: even(0, 5), "even: cannot be spread over 0 experts; expected an int in 1..65536."),
            (lambda: even(10**9, 5), "even: cannot be spread over 1000000000 experts; expected an int in 1..65536."),
            (lambda: even(True, 5), "even: cannot be spread over True experts; expected an int in 1..65536."),
            (lambda: even(2, -1), "even: cannot have -1 rows; expected an int in 0..2147483647."),
            (lambda: even(2, 2**31), "even: cannot have 2147483648 rows; expected an int in 0..2147483647."),
            (lambda: even(2, 5, max_per_expert=-1), "even: max_per_expert is -1; expected a non-negative int or None."),
            (lambda: zipf(-1, 2, 5), "zipf: s is -1; expected a finite number >= 0."),
            (lambda: zipf(math.nan, 2, 5), "zipf: s is nan; expected a finite number >= 0."),
            (lambda: log_normal(math.inf, 2, 5), "log_normal: sigma is inf; expected a finite number >= 0."),
            (
                lambda: zipf(1.2, 4, 100, max_per_expert=20),
                "zipf:1.2: 4 active experts of at most 20 rows hold 80, not 100 rows; "
                "raise max_per_expert or lower the rows.",
            ),
        ],
    )
    def test_errors(self, call: Callable[[], object], says: str) -> None:
        assert error_of(call) == says


class TestFromFile:
    def write(self, folder: Path, data: object, name: str = "counts.json") -> Path:
        path = folder / name
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return path

    def test_list(self, tmp_path: Path) -> None:
        dist = from_file(self.write(tmp_path, [3, 0, 5]))
        assert dist == Distribution("counts", (3, 0, 5), "counts read from counts.json")

    def test_object(self, tmp_path: Path) -> None:
        data = {"num_tokens_per_expert": [1, 2], "name": "mine", "source": "layer 3", "other": [True]}
        assert from_file(str(self.write(tmp_path, data))) == Distribution("mine", (1, 2), "layer 3")

    def test_all_zero(self, tmp_path: Path) -> None:
        dist = from_file(self.write(tmp_path, [0, 0]))
        assert dist.total_tokens == 0
        assert "all 2 experts have 0 rows" in error_of(lambda: resample(dist, total_tokens=4))

    @pytest.mark.parametrize(
        ("data", "says"),
        [
            ("", "is not JSON (Expecting value: line 1 column 1 (char 0))"),
            ("[1, 2\n", "is not JSON ("),
            ("[" * 100_000, "is not JSON ("),
            ([], ": the list is empty; expected at least one expert"),
            ({"num_tokens_per_expert": []}, ": num_tokens_per_expert is empty"),
            ([1, -1], ": the list[1] is -1; expected a non-negative integer"),
            ([1, 2.0], ": the list[1] is 2.0; expected a non-negative integer"),
            ("[NaN]", ": the list[0] is nan; expected a non-negative integer"),
            ([True], ": the list[0] is True; expected a non-negative integer"),
            ([[1, 2]], ": the list[0] is [1, 2]; expected a non-negative integer"),
            ([None], ": the list[0] is None; expected a non-negative integer"),
            (["a\nb" * 500], ": the list[0] is 'a\\nba"),
            ([2**31], ": the list sums to 2147483648; expected at most 2147483647 (int32)"),
            ({"counts": [1]}, "is an object without num_tokens_per_expert; add it"),
            ({"num_tokens_per_expert": {"0": 1}}, "holds {'0': 1}; expected a list of counts"),
            ("7", "holds 7; expected a list of counts, or an object with num_tokens_per_expert"),
            ({"num_tokens_per_expert": [1], "name": "a\nb"}, "name is 'a\\nb'; expected one line of text"),
            ({"num_tokens_per_expert": [1], "source": 3}, "source is 3; expected one line of text"),
        ],
    )
    def test_bad_content(self, tmp_path: Path, data: object, says: str) -> None:
        path = self.write(tmp_path, data)
        message = error_of(lambda: from_file(path))
        assert message.startswith(f"from_file: {str(path)!r}") and says in message

    def test_unreadable(self, tmp_path: Path) -> None:
        missing = tmp_path / "none.json"
        assert f"{str(missing)!r} cannot be read (No such file" in error_of(lambda: from_file(missing))
        assert "cannot be read (Is a directory)" in error_of(lambda: from_file(tmp_path))
        assert "cannot be read (embedded null" in error_of(lambda: from_file("a\0b.json"))

    def test_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / "binary.json"
        path.write_bytes(b"[\xff\xfe]")
        assert "is not JSON (" in error_of(lambda: from_file(path))


class TestResample:
    def test_nothing_to_do_returns_the_same_object(self) -> None:
        dist = recorded()
        assert resample(dist) is dist
        assert resample(dist, 256, 31440, seed=5, max_per_expert=2491) is dist

    def test_literal_values_for_a_seed(self) -> None:
        dist = resample(recorded(), 12, 300, seed=3)
        assert dist.counts == (2, 3, 0, 228, 1, 18, 0, 33, 9, 5, 1, 0)
        assert resample(recorded(), 12, 300, seed=3) == dist
        assert sorted(resample(recorded(), 12, 300, seed=4).counts) == sorted(dist.counts)

    def test_quantiles_by_hand(self) -> None:
        # Active, sorted: 2 4 8 16. Seven of them at steps of half an expert: 2 3 4 6 8 12 16; empty: 4 of 8 -> 7 of 14.
        dist = resample(dist_of([0, 16, 0, 4, 8, 0, 2, 0]), 14, 51)
        assert sorted(dist.counts) == [0] * 7 + [2, 3, 4, 6, 8, 12, 16]

    def test_says_what_it_did(self) -> None:
        once = resample(recorded(), 64, 4096)
        assert once.scaled == "autoround-256 resampled from 256 experts, 31440 rows to 64 experts, 4096 rows"
        assert (once.name, once.source) == (recorded().name, recorded().source)
        twice = resample(once, 32, max_per_expert=512)
        assert twice.scaled == f"{once.scaled}; then to 32 experts, 4096 rows, at most 512 rows per expert"
        assert resample(recorded(), max_per_expert=1000).scaled == (
            "autoround-256 resampled from 256 experts, 31440 rows to 256 experts, 31440 rows, "
            "at most 1000 rows per expert"
        )

    @pytest.mark.parametrize("experts", [64, 96, 128, 192, 255, 257, 512, 1000])
    def test_keeps_the_shape(self, experts: int) -> None:
        old, new = recorded(), resample(recorded(), experts, 123 * experts)

        def share(dist: Distribution, top: float) -> float:
            whole, part = divmod(top * dist.num_experts, 1)
            ordered = sorted(dist.counts, reverse=True)
            return (sum(ordered[: int(whole)]) + part * ordered[int(whole)]) / dist.total_tokens

        assert peak(new) == pytest.approx(peak(old), rel=0.15)
        assert abs(new.counts.count(0) / experts - 18 / 256) <= 1.5 / experts
        for top in (0.1, 0.25, 0.5):
            assert share(new, top) == pytest.approx(share(old, top), abs=0.05)

    @pytest.mark.parametrize(
        ("experts", "expected"),
        [(1, 1.0), (2, 2.0), (3, 2.9), (8, 7.0), (16, 10.6), (32, 14.4), (64, 17.5), (256, 20.3)],
    )
    def test_few_experts_stay_as_heavy_tailed_as_they_can(self, experts: int, expected: float) -> None:
        assert peak(resample(recorded(), experts, 10**6)) == pytest.approx(expected, abs=0.1)

    def test_shuffle_leaves_no_sorted_run(self) -> None:
        counts = resample(recorded(), 64, 31440).counts
        ascents = sum(a < b for a, b in pairwise(counts))
        assert 20 <= ascents <= 43

    @given(COUNTS, EXPERTS, ROWS, SEEDS)
    @fuzz
    def test_sum_is_exact(self, counts: list[int], experts: int, rows: int, seed: int) -> None:
        if sum(counts) == 0:
            rows = 0
        dist = resample(dist_of(counts), experts, rows, seed)
        assert (dist.num_experts, dist.total_tokens) == (experts, rows)
        assert dist == resample(dist_of(counts), experts, rows, seed)

    @given(COUNTS.filter(any), ROWS, st.one_of(st.none(), st.integers(0, 3000)))
    @fuzz
    def test_another_total_is_largest_remainder_in_place(self, counts: list[int], rows: int, cap: int | None) -> None:
        dist = dist_of(counts)
        if cap is not None and cap * dist.active_experts < rows:
            message = error_of(lambda: resample(dist, total_tokens=rows, max_per_expert=cap))
            assert f"{dist.active_experts} active experts of at most {cap} rows hold" in message
            return
        new = resample(dist, total_tokens=rows, max_per_expert=cap)
        assert list(new.counts) == largest_remainder(counts, rows, cap)
        assert cap is None or new.max_tokens <= cap
        pairs = sorted(zip(counts, new.counts, strict=True), key=lambda pair: (pair[0], pair[1]))
        for (small, new_small), (large, new_large) in pairwise(pairs):
            assert small == large or new_small <= new_large

    @given(COUNTS.filter(any), st.integers(0, 5000), SEEDS)
    @fuzz
    def test_more_rows_keep_empty_and_active(self, counts: list[int], more: int, seed: int) -> None:
        new = resample(dist_of(counts), total_tokens=sum(counts) + more, seed=seed)
        assert [n > 0 for n in new.counts] == [n > 0 for n in counts]
        assert all(n >= old for old, n in zip(counts, new.counts, strict=True))

    @given(COUNTS.filter(any), EXPERTS, SEEDS)
    @fuzz
    def test_another_number_of_experts_keeps_the_empty_share(self, counts: list[int], experts: int, seed: int) -> None:
        new = resample(dist_of(counts), experts, 10**9, seed)
        share = Fraction(sum(n > 0 for n in counts), len(counts))
        assert abs(new.active_experts - share * experts) <= Fraction(1, 2) or new.active_experts == 1

    @given(COUNTS.filter(any), EXPERTS, SEEDS)
    @fuzz
    def test_another_number_of_experts_keeps_the_extremes(self, counts: list[int], experts: int, seed: int) -> None:
        active = [n for n in resample(dist_of(counts), experts, 10**9, seed).counts if n]
        if len(active) > 1:
            old = [n for n in counts if n]
            assert max(active) / min(active) == pytest.approx(max(old) / min(old), rel=1e-3)

    @pytest.mark.parametrize(
        ("call", "says"),
        [
            (lambda: resample(recorded(), 0), "cannot be spread over 0 experts; expected an int in 1..65536."),
            (lambda: resample(recorded(), -3), "cannot be spread over -3 experts; expected an int in 1..65536."),
            (lambda: resample(recorded(), 65537), "cannot be spread over 65537 experts; expected an int in 1..65536."),
            (lambda: resample(recorded(), 8, -1), "cannot have -1 rows; expected an int in 0..2147483647."),
            (
                lambda: resample(recorded(), 8, 800, max_per_expert=99),
                "7 active experts of at most 99 rows hold 693, not 800 rows; raise max_per_expert or lower the rows.",
            ),
        ],
    )
    def test_errors(self, call: Callable[[], object], says: str) -> None:
        assert error_of(call) == f"resample: autoround-256: {says}"

    def test_nothing_out_of_nothing(self) -> None:
        zero = dist_of([0, 0, 0])
        assert resample(zero, 5).counts == (0,) * 5
        assert resample(zero) is zero
        assert error_of(lambda: resample(zero, 5, 7)) == (
            "resample: test: all 3 experts have 0 rows; cannot be resampled to 7 rows."
        )


class TestParse:
    def test_recorded(self) -> None:
        assert parse_distribution("autoround-256") == recorded()
        assert parse_distribution(" autoround-256 ", num_experts=64, total_tokens=4096, seed=2) == resample(
            recorded(), 64, 4096, 2
        )

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("even", even(256, 31440)),
            ("zipf", zipf(1.0, 256, 31440, 7)),
            ("zipf:1.2", zipf(1.2, 256, 31440, 7)),
            ("log-normal", log_normal(1.5, 256, 31440, 7)),
            ("log-normal:0.5", log_normal(0.5, 256, 31440, 7)),
            ("lognormal:2", log_normal(2, 256, 31440, 7)),
        ],
    )
    def test_synthetic_has_the_recorded_size(self, text: str, expected: Distribution) -> None:
        assert parse_distribution(text, seed=7) == expected

    def test_sizes_and_cap_are_passed_on(self) -> None:
        got = parse_distribution("zipf:2", num_experts=16, total_tokens=800, seed=1, max_per_expert=100)
        assert got == zipf(2, 16, 800, 1, max_per_expert=100)
        got = parse_distribution("autoround-256", num_experts=16, total_tokens=800, max_per_expert=100)
        assert got.max_tokens == 100 and got.total_tokens == 800
        assert parse_distribution("even", total_tokens=0).counts == (0,) * 256

    def test_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("a.json", "plain", "even"):
            (tmp_path / name).write_text("[1, 3]")
        assert parse_distribution("a.json").counts == (1, 3)
        assert parse_distribution("plain").counts == (1, 3)
        assert parse_distribution("./even").counts == (1, 3)
        assert parse_distribution("even") == even(256, 31440)
        assert parse_distribution(str(tmp_path / "a.json"), total_tokens=8).counts == (2, 6)

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("nope", "distribution: 'nope' is not known; expected one of autoround-256, even, hot[:SHARE], zipf[:S], "),
            ("", "distribution: '' is not known; expected one of "),
            ("a\nb", "distribution: 'a\\nb' is not known; "),
            ("even:3", "distribution: 'even:3'; even takes no parameter, give even."),
            ("zipf:", "distribution: 'zipf:'; expected a number after the colon, as in zipf:1.2."),
            ("lognormal:x", "distribution: 'lognormal:x'; expected a number after the colon, as in log-normal:1.2."),
            ("zipf:-1", "zipf: s is -1.0; expected a finite number >= 0."),
            ("log-normal:inf", "log_normal: sigma is inf; expected a finite number >= 0."),
            ("none.json", "from_file: 'none.json' cannot be read (No such file or directory); "),
            ("no/such", "from_file: 'no/such' cannot be read (No such file or directory); "),
        ],
    )
    def test_errors(self, text: str, says: str) -> None:
        assert error_of(lambda: parse_distribution(text)).startswith(says)


class TestRoute:
    @pytest.mark.parametrize("renormalize", [True, False])
    @pytest.mark.parametrize(("tokens", "experts", "top_k"), [(5, 8, 2), (3, 4, 4), (4, 1, 1), (0, 8, 2), (7, 257, 8)])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_definition(self, tokens: int, experts: int, top_k: int, dtype: torch.dtype, renormalize: bool) -> None:
        generator = torch.Generator().manual_seed(tokens * experts)
        # A permutation a token, so that no two experts are equal in any dtype.
        rows = [torch.randperm(experts, generator=generator) for _ in range(tokens)]
        logits = (torch.stack(rows) / 16 if rows else torch.empty(0, experts)).to(dtype)
        ids, weights = route(logits, top_k, renormalize=renormalize)
        assert ids.dtype == torch.int32 and weights.dtype == torch.float32
        assert ids.shape == weights.shape == (tokens, top_k)
        for t in range(tokens):
            values = logits[t].tolist()
            best = sorted(range(experts), key=lambda e: -values[e])[:top_k]
            exps = [math.exp(v) for v in values]
            total = sum(exps[e] for e in best) if renormalize else sum(exps)
            assert ids[t].tolist() == best
            assert weights[t].tolist() == pytest.approx([exps[e] / total for e in best], rel=1e-5)

    def test_softmax_is_fp32(self) -> None:
        logits = torch.tensor([[300.0, 299.0, -300.0]], dtype=torch.float16)
        _, weights = route(logits, 2)
        assert weights[0].tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))], rel=1e-6)

    def test_masked_experts_and_strides(self) -> None:
        logits = torch.tensor([[-math.inf, 1.0], [0.5, 0.0], [2.0, -math.inf]])
        ids, weights = route(logits.T, 2)
        assert ids.tolist() == [[2, 1], [0, 1]]
        assert weights.sum(dim=-1).tolist() == pytest.approx([1, 1])

    def test_gradient_reaches_the_logits(self) -> None:
        logits = torch.randn(3, 4, dtype=torch.float64).float().requires_grad_()
        route(logits, 2)[1][:, 0].sum().backward()
        assert logits.grad is not None and logits.grad.abs().sum() > 0

    @pytest.mark.parametrize(
        ("logits", "says"),
        [
            (torch.zeros(4), "route: logits are (4,) float32; expected floating point [T, E] with E >= 1."),
            (torch.zeros(1, 2, 3), "route: logits are (1, 2, 3) float32; "),
            (torch.zeros(4, 0), "route: logits are (4, 0) float32; "),
            (torch.zeros(4, 8, dtype=torch.int32), "route: logits are (4, 8) int32; "),
        ],
    )
    def test_bad_logits(self, logits: torch.Tensor, says: str) -> None:
        assert error_of(lambda: route(logits, 1)).startswith(says)

    @pytest.mark.parametrize("top_k", [0, -1, 9, True, 2.0])
    def test_bad_top_k(self, top_k: int) -> None:
        assert error_of(lambda: route(torch.zeros(4, 8), top_k)) == (
            f"route: top_k is {top_k!r}; expected an int in 1..E = 1..8."
        )
