import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.core.registry import Registry


@pytest.fixture
def fruits():
    registry = Registry[str]("fruit")
    registry.register("apple", "apples")("red")
    registry.register("pear")("green")
    return registry


def test_a_value_is_found_under_each_of_its_names(fruits):
    assert fruits["apple"] == fruits["apples"] == "red"
    assert "pear" in fruits
    assert "plum" not in fruits


def test_names_come_in_order_of_registration(fruits):
    assert list(fruits) == ["apple", "apples", "pear"]


def test_register_returns_the_value_so_that_it_can_decorate():
    registry = Registry[type]("kind")

    @registry.register("thing")
    class Thing:
        pass

    assert registry["thing"] is Thing


def test_a_miss_suggests_the_nearest_name_and_lists_all(fruits):
    with pytest.raises(ConfigError) as caught:
        fruits["peer"]
    assert str(caught.value) == (
        "unknown fruit 'peer'. Did you mean 'pear'? Known: apple, apples, pear."
    )


def test_a_miss_in_an_empty_registry_says_that_there_is_none():
    with pytest.raises(ConfigError, match=r"unknown fruit 'fig'\. Known: none"):
        Registry[str]("fruit")["fig"]


def test_a_name_cannot_be_taken_twice(fruits):
    with pytest.raises(ConfigError, match="fruit 'pear' is registered twice"):
        fruits.register("pear")("yellow")
