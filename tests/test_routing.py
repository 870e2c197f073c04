"""Dispatch among several providers of one API."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from llama_stack.apis import Api, Models, ServedModel, get, post
from llama_stack.apis.common import Id, Schema
from llama_stack.apis.models import ModelKind
from llama_stack.errors import (
    AlreadyExistsError,
    ModelNotFoundError,
    NotFoundError,
    ProviderUnavailableError,
    UpstreamError,
)
from llama_stack.routing import ModelCatalog, route


class Order(Schema):
    """Something to say by a voice that may not exist yet."""

    voice: Id


class Choir(Api, name="choir", routed_by="voice"):
    """A contract with every kind of call that routing tells apart."""

    async def owns(self, resource: str) -> bool:
        return resource in await self.names()

    async def names(self) -> list[str]:
        """No operation: asked of every provider."""
        raise NotImplementedError

    @post("/choir/sing")
    async def sing(self, order: Order) -> str:
        """Routed by a field of the body."""
        raise NotImplementedError

    @post("/choir/join", creates=True)
    async def join(self, voice: Id) -> str:
        """Creates what it names."""
        raise NotImplementedError

    @post("/choir/double", names="double")
    async def double(self, voice: Id, double: Id) -> str:
        """Brings another of the kind, beside the one that it names."""
        raise NotImplementedError

    @get("/choir/all")
    async def all(self) -> AsyncIterator[str]:
        """Lists."""
        raise NotImplementedError

    @post("/choir/echo")
    async def echo(self, order: list[str]) -> AsyncIterator[str]:
        """Answers in lines and lists nothing."""
        raise NotImplementedError

    @get("/choir/leader")
    async def leader(self) -> str:
        """Names nothing."""
        raise NotImplementedError


class Singers(Choir):
    """A provider that says who answered."""

    def __init__(self, *voices: str) -> None:
        self.voices = list(voices)

    async def names(self) -> list[str]:
        return self.voices

    async def sing(self, order: Order) -> str:
        return f"{order.voice} of {len(self.voices)}"

    async def join(self, voice: Id) -> str:
        self.voices.append(voice)
        return self.voices[0]

    async def double(self, voice: Id, double: Id) -> str:
        self.voices.append(double)
        return f"{double} beside {self.voices[0]}"

    async def all(self) -> AsyncIterator[str]:
        async def each() -> AsyncIterator[str]:
            for voice in self.voices:
                yield voice

        return each()

    async def echo(self, order: list[str]) -> AsyncIterator[str]:
        async def each() -> AsyncIterator[str]:
            for word in order:
                yield word

        return each()

    async def leader(self) -> str:
        return self.voices[0]


class Backend:
    """A provider of the distribution, up while it has a provider."""

    def __init__(self, provider: Api | None, name: str = "b") -> None:
        self.provider = provider
        self.id = name

    @property
    def is_running(self) -> bool:
        return self.provider is not None

    def running(self) -> Api:
        if self.provider is None:
            raise ProviderUnavailableError(f"{self.id} is down")
        return self.provider


@pytest.fixture
def choir() -> Choir:
    return route(Choir, [Backend(Singers("alto", "bass")), Backend(Singers("tenor"))])


@pytest.mark.anyio
async def test_a_request_goes_to_the_provider_that_owns_the_resource(choir: Choir) -> None:
    """The body's field decides, given by position or by name: providers call each other both ways."""
    assert await choir.sing(Order(voice="bass")) == "bass of 2"
    assert await choir.sing(order=Order(voice="tenor")) == "tenor of 1"


@pytest.mark.anyio
async def test_what_nobody_owns_is_not_found_by_name(choir: Choir) -> None:
    """A guess at a provider would answer for a resource that is not there."""
    with pytest.raises(NotFoundError, match="voice 'soprano' does not exist here"):
        await choir.sing(Order(voice="soprano"))


@pytest.mark.anyio
async def test_a_new_resource_goes_to_the_first_provider_and_an_old_one_to_its_owner(choir: Choir) -> None:
    """Creating the same id twice must reach the provider that has it, or there would be two."""
    assert await choir.join("soprano") == "alto"
    assert await choir.join("tenor") == "tenor"
    assert await choir.sing(Order(voice="soprano")) == "soprano of 3"


@pytest.mark.anyio
async def test_a_new_name_is_refused_where_another_provider_has_it(choir: Choir) -> None:
    """Two of one name would hide each other; whether its own provider takes the name again is that one's to say."""
    with pytest.raises(AlreadyExistsError, match="voice 'alto' exists") as refused:
        await choir.double("tenor", "alto")
    assert refused.value.param == "double"
    assert await choir.names() == ["alto", "bass", "tenor"]
    assert await choir.double(voice="tenor", double="tenor") == "tenor beside tenor"
    assert await choir.double(voice="tenor", double="descant") == "descant beside tenor"


@pytest.mark.anyio
async def test_lists_are_joined_and_the_rest_goes_to_the_first(choir: Choir) -> None:
    """A list that showed one provider's resources only would hide the others."""
    assert [voice async for voice in await choir.all()] == ["alto", "bass", "tenor"]
    assert [word async for word in await choir.echo(["la", "lo"])] == ["la", "lo"]
    assert await choir.leader() == "alto"
    assert await choir.names() == ["alto", "bass", "tenor"]
    assert await choir.owns("tenor")
    assert not await choir.owns("soprano")


@pytest.mark.anyio
async def test_a_resource_that_may_belong_to_a_provider_that_is_down_is_unavailable(choir: Choir) -> None:
    """404 would tell a client that its resource is gone, and creating it again would make a second one."""
    choir = route(Choir, [Backend(Singers("alto")), Backend(None, "second")])
    assert await choir.sing(Order(voice="alto")) == "alto of 1"
    for call in (choir.sing(Order(voice="tenor")), choir.join("tenor")):
        with pytest.raises(ProviderUnavailableError, match="second is down"):
            await call


class OutOfReach(Singers):
    """A provider that runs, such as ``remote``, while the server that it speaks for cannot be reached."""

    async def names(self) -> list[str]:
        raise UpstreamError("no connection")


@pytest.mark.anyio
async def test_a_provider_that_cannot_say_what_it_owns_hides_nothing_of_the_others() -> None:
    """A remote server that went away must not take the models of this machine with it."""
    choir = route(Choir, [Backend(OutOfReach("tenor")), Backend(Singers("alto"))])
    assert await choir.sing(Order(voice="alto")) == "alto of 1"
    for call in (choir.sing(Order(voice="tenor")), choir.join("tenor")):
        with pytest.raises(UpstreamError, match="no connection"):
            await call


@pytest.mark.anyio
async def test_a_list_that_would_lack_a_provider_is_unavailable_before_its_first_line() -> None:
    """Half a list sent with 200 looks like the whole one."""
    choir = route(Choir, [Backend(Singers("alto")), Backend(None, "second")])
    with pytest.raises(ProviderUnavailableError, match="second is down"):
        await choir.all()


@pytest.mark.anyio
async def test_a_single_provider_gets_every_call_as_it_stands() -> None:
    """With one provider nothing is looked up: unknown resources are that provider's to refuse."""
    choir = route(Choir, [Backend(Singers("alto"))])
    assert await choir.sing(Order(voice="nobody")) == "nobody of 1"
    assert isinstance(choir, Choir)


class Shop(Api, name="shop", routed_by="model"):
    """A contract routed by model."""

    @post("/shop/ask")
    async def ask(self, model: Id) -> str:
        """Routed by a query parameter."""
        raise NotImplementedError


class Seller(Shop):
    """Serves models."""

    def __init__(self, *names: str) -> None:
        self.served = [ServedModel(model=name, kind=ModelKind.LLM) for name in names]

    async def models(self) -> list[ServedModel]:
        return self.served

    async def owns(self, resource: str) -> bool:
        return any(model.model == resource for model in self.served)

    async def ask(self, model: Id) -> str:
        return model


@pytest.mark.anyio
async def test_an_unknown_model_is_answered_with_the_names_that_are_served() -> None:
    """The client's next step is to choose one of them."""
    shop = route(Shop, [Backend(Seller("tiny")), Backend(Seller("big"))])
    assert await shop.ask("big") == "big"
    with pytest.raises(ModelNotFoundError, match="served: big, tiny; did you mean 'tiny'"):
        await shop.ask("tiiny")


@pytest.mark.anyio
async def test_the_catalogue_lists_the_models_of_every_provider_that_is_up() -> None:
    """It names the provider of each, and a provider that is down does not make the list fail."""
    catalogue: Models = ModelCatalog(
        [Backend(Seller("tiny"), "a"), Backend(None, "b"), Backend(Seller("big"), "c"), Backend(Singers("alto"), "d")]
    )
    assert [(m.model, m.provider_id) async for m in await catalogue.list_models()] == [("big", "c"), ("tiny", "a")]
