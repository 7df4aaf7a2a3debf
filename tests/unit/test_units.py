import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.core.units import format_bytes, parse_count


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (2**30, "1.0 GiB"),
        (3 * 2**40, "3.0 TiB"),
        (5 * 2**50, "5120.0 TiB"),
    ],
)
def test_bytes_are_printed_in_binary_units(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (7, 7),
        ("4096", 4096),
        ("4k", 4000),
        ("4K", 4096),
        (" 25.6k ", 25600),
        ("1.5M", 3 * 2**19),
        ("2m", 2_000_000),
        ("2g", 2 * 10**9),
        ("1G", 2**30),
        ("1T", 2**40),
    ],
)
def test_counts_may_carry_a_decimal_or_binary_suffix(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "k", "4q", "four", "1.0001k", "nan", "inf", "1e3K3"])
def test_a_count_that_is_no_whole_number_is_refused(text):
    with pytest.raises(ConfigError, match="expected a whole number such as 4096, 4k or 4K"):
        parse_count(text)
