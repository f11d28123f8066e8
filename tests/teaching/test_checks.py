"""Checks pass the right answer in any right form, and never a dummy or a classical mistake."""

import pytest
import torch

from tfswa_lab.audio import STEMS
from tfswa_lab.teaching.checks import lesson_00, lesson_01, mismatch, verdict


def power_mask(S):
    power = S.abs().square()
    return power / power.sum(0).clamp(min=1e-12)


def griffin_lim(magnitude, stft, length, rounds):
    phase = 6.28 * torch.rand_like(magnitude)
    for _ in range(rounds):
        phase = stft(stft.istft(torch.polar(magnitude, phase), length)).angle()
    return stft.istft(torch.polar(magnitude, phase), length)


def balance(stems, level_db):
    rms = stems.square().mean((1, 2), keepdim=True).sqrt()
    return stems * 10 ** (level_db / 20) / rms.clamp(min=1e-9)


def karaoke(stems, names, mute):
    return stems.sum(0) - stems[list(names).index(mute)]


RIGHT = [
    (lesson_00.check_gain, lambda db: 10 ** (db / 20)),
    (lesson_00.check_karaoke, karaoke),
    (lesson_00.check_balance, balance),
    (lesson_01.check_nearest_bin, lambda hz, n_fft, rate: round(hz / rate * n_fft)),
    (lesson_01.check_nearest_bin, lambda hz, n_fft, rate: torch.tensor(round(hz / rate * n_fft))),
    (lesson_01.check_power_mask, power_mask),
    (lesson_01.check_power_mask, lambda S: power_mask(S).numpy()),
    (lesson_01.check_griffin_lim, griffin_lim),
]

# A wrong answer, and a word that the hint must contain.
WRONG = [
    (lesson_00.check_gain, lambda db: 10 ** (db / 10), "power"),
    (lesson_00.check_karaoke, lambda stems, names, mute: stems.sum(0), "values differ"),
    (lesson_00.check_karaoke, lambda stems, names, mute: karaoke(stems, STEMS, mute), "names"),
    (lesson_00.check_balance, lambda stems, db: balance(stems, db) / 2, "-20 dB"),
    (lesson_00.check_balance, lambda s, db: s * 0.1 / s.square().mean((1, 2), True).sqrt(), "NaN"),
    (lesson_01.check_nearest_bin, lambda hz, n_fft, rate: int(hz / rate * n_fft), "30 Hz"),
    (lesson_01.check_power_mask, lambda S: S.abs() / S.abs().sum(0), "square"),
    (lesson_01.check_power_mask, lambda S: (S.abs() / S.sum(0).abs()) ** 2, "mixture"),
    (lesson_01.check_power_mask, lambda S: S.abs() ** 2 / (S.abs() ** 2).sum(0), "0 by 0"),
    (lesson_01.check_griffin_lim, lambda m, stft, n, r: griffin_lim(m, stft, n, 3), "better than"),
    (lesson_01.check_griffin_lim, lambda m, stft, n, r: torch.zeros(n), "silence"),
]

CHECKS = sorted({check for check, _ in RIGHT}, key=lambda check: check.__name__)


@pytest.mark.parametrize(("check", "answer"), RIGHT)
def test_right_answers_pass(check, answer, capsys):
    assert check(answer) is True
    assert capsys.readouterr().out.startswith("passed: ")


@pytest.mark.parametrize(("check", "answer", "hint"), WRONG)
def test_classical_mistakes_get_a_hint(check, answer, hint, capsys):
    assert check(answer) is False
    said = capsys.readouterr().out
    assert said.startswith("not yet: ")
    assert hint in said


@pytest.mark.parametrize("dummy", [None, 0, 0.0, "your turn", torch.zeros(1), torch.zeros(2, 3)])
@pytest.mark.parametrize("check", CHECKS)
def test_a_dummy_is_no_error(check, dummy, capsys):
    assert check(lambda *arguments: dummy) is False
    assert capsys.readouterr().out.startswith("not yet: ")


@pytest.mark.parametrize("check", CHECKS)
def test_an_exception_in_the_answer_is_the_readers_to_see(check):
    def broken(*arguments):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        check(broken)


def test_mismatch_in_words():
    assert mismatch(torch.tensor(2), 2) is None
    assert mismatch(1.0 + 1e-7, 1.0) is None
    assert "differ" in mismatch(torch.ones(9), torch.zeros(9))
    assert "shape (2, 3)" in mismatch(torch.ones(3, 2), torch.ones(2, 3))
    assert "NaN" in mismatch(torch.full((2,), torch.nan), torch.ones(2))
    assert mismatch(float("inf"), 1.0)


def test_the_verdict_is_printed_once(capsys):
    assert verdict("gain", None)
    assert capsys.readouterr().out == "passed: gain\n"
