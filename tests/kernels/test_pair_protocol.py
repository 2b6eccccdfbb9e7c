"""Who waits for whom where two query blocks of 64 share a program of the Hopper kernel, checked without a GPU.

In test_hopper_interpreted.py the kernel itself runs, in a few orders. Here the producer, every warp of both consumers
and the warps that store are written as in ``hopper/producer.py``, ``pair_consumer.py``, ``epilogue.py`` and
``store.py``, of half precision and of 8 bits, with a ``yield`` wherever others may go on, and loads arrive after any
time, in any order. The barriers are the hardware's: one
in shared memory knows the parity of its phase and no more, a named one counts threads. Which block a step loads and how
buffers are counted is the kernel's own code.
"""

import random
import types

import pytest

from .test_ring_protocol import HOPPER, digest

# What the model was written from. A function that has changed needs a look at the model, and then its new digest here.
MODELLED = {
    "producer.py": {"produce": "d4e30741123d", "load_v": "94ad5e97d8e1"},
    "pair_consumer.py": {"consume_pair": "cf188cc3e5fb", "own_header": "9d5cf3320704"},
    "named_barriers.py": {
        "pair_release": "1a79eb49a148",
        "pair_acquire_v": "8432fa560ab5",
        "pair_tail": "93fd436173e9",
    },
    "tile_scheduler.py": {"pair_header": "cc31565485e7"},
    "epilogue.py": {"epilogue": "8f78c6045b2c"},
    "store.py": {"store_loop": "160f8f9fbdff", "store_o": "7ae42d5d48b2"},
}
WARPS = 2  # of a consumer, where the kernel has four
BOTH, OWNER, PRODUCER = 288, 160, 32


def kernel_functions():
    """``pair_entry``, ``advance_stage`` and ``skip_stage`` of the kernel, of numbers in place of its tensors."""
    from dit_accel.kernels.attention.hopper import consumer, pair_consumer, tile_scheduler

    numbers = types.SimpleNamespace(minimum=min, where=lambda condition, yes, no: yes if condition else no)
    made = {}
    for module, name in ((tile_scheduler, "pair_entry"), (consumer, "advance_stage"), (pair_consumer, "skip_stage")):
        code = getattr(module, name).fn.__code__
        made[name] = types.FunctionType(code, {"gl": numbers, **made})
    return made["pair_entry"], made["advance_stage"], made["skip_stage"]


pair_entry, advance_stage, skip_stage = kernel_functions()


class Wrong(AssertionError):
    """The kernel would read the wrong block, or break a rule of its barriers."""


class Barrier:
    """In shared memory; a wait is for the phase of a parity."""

    def __init__(self, arrivals=1):
        self.arrivals = self.missing = arrivals
        self.done = 0
        self.loading = False

    def passed(self, parity):
        return self.done % 2 != parity

    def arrive(self):
        self.missing -= 1
        if self.missing == 0:
            self.missing = self.arrivals
            self.done += 1


class Named:
    """A named barrier; ``arrive`` does not wait, ``sync`` does: it gives what must be done before going on."""

    def __init__(self):
        self.threads, self.expected, self.rounds = 0, None, 0
        self.who = []

    def arrive(self, who, threads, expected):
        if who in self.who:
            raise Wrong(f"{who} arrives twice")
        if self.expected not in (None, expected):
            raise Wrong(f"{who} expects {expected} threads, others {self.expected}")
        self.expected, self.threads = expected, self.threads + threads
        self.who.append(who)
        if self.threads > expected:
            raise Wrong("more threads than expected")
        if self.threads == expected:
            self.threads, self.expected, self.who = 0, None, []
            self.rounds += 1

    def sync(self, who, threads, expected):
        rounds = self.rounds
        self.arrive(who, threads, expected)
        while self.rounds == rounds:
            yield


class Program:
    """One program with its tiles, each ``(first, second, shared)``; ``mutation`` names a rule that is left out.

    ``means``: blocks of means that come before every list, of half precision alone.
    ``quantized``: the producer loads queries that are permuted too, consumers give them back, and outputs have two
    buffers of their own.
    """

    def __init__(self, tiles, stages, turns, permuted, quantized, chance, mutation="", means=0):
        self.tiles, self.stages, self.turns, self.permuted = tiles, stages, turns, permuted
        self.means, self.headers = means, [tuple(x + means for x in tile) for tile in tiles]
        self.quantized, self.chance, self.mutation = quantized, chance, mutation
        self.k_full, self.v_full = ([Barrier() for _ in range(stages)] for _ in range(2))
        self.q_full, self.q_empty = ([Barrier() for _ in range(4)] for _ in range(2))
        self.o_full = [Barrier(WARPS) for _ in range(2 if quantized else 4)]
        self.o_empty = [Barrier() for _ in range(2)]
        # What outputs leave through, and whose rows in memory are known.
        self.o_smem, self.row_idx = [None] * 2, [None] * 4
        self.empty = [Named() for _ in range(stages)]
        self.turn = [Named(), Named()]
        # What lies in a buffer: (tile, list, entry), of means (tile, "means", number), or None while it is written.
        self.k_smem, self.v_smem, self.q_smem = [None] * stages, [None] * stages, [None] * 4
        if quantized:
            self.q_empty = [Barrier(WARPS) for _ in range(4)]
        self.clock, self.flying = 0, []
        self.read = []  # (tile, list, entry) of each product, by warp
        self.stored = []
        self.lag = 1 if mutation == "values are given back as in order" else 2

    def load(self, barrier, buffers, at, content):
        if barrier.loading:
            raise Wrong("a buffer is loaded twice at once")
        barrier.loading, buffers[at] = True, None
        # Now and then one takes much longer than those behind it.
        self.flying.append((self.clock + self.chance.choice([1, 5, 20, 20, 300]), barrier, buffers, at, content))

    def tick(self):
        self.clock += 1
        for load in [load for load in self.flying if load[0] <= self.clock]:
            _, barrier, buffers, at, content = load
            self.flying.remove(load)
            barrier.loading, buffers[at] = False, content
            barrier.arrive()

    def block(self, tile, step, of_means):
        """Whose entry a step loads, of shared ones the first list's, or which block of means; lists go on behind."""
        if of_means:
            return tile, "means", step
        length = 1000
        return tile, *divmod(pair_entry(step, *self.headers[tile], length) - self.means, length)

    def acquire_v(self, step, history):
        if step >= self.stages - self.lag:
            alternate = history >> (self.stages - self.lag) & 1
            expected = OWNER if alternate else BOTH
            yield from self.empty[(step + self.lag) % self.stages].sync("producer", PRODUCER, expected)

    def produce(self):
        step = turn = history = 0
        behind = self.mutation != "values of means end a step early"
        for tile, (first, second, both) in enumerate(self.headers):
            count, short = first + second - both, min(first, second)
            before = None
            for entry in range(count):
                stage = step % self.stages
                if entry == 0 and (self.quantized or not self.permuted):
                    yield from self.load_q(tile, turn)
                self.load(self.k_full[stage], self.k_smem, stage, self.block(tile, entry, entry < self.means))
                yield
                if entry > 0:
                    yield from self.acquire_v(step - 1, history)
                    of_means = entry < self.means + behind
                    self.load(self.v_full[before], self.v_smem, before, self.block(tile, entry - 1, of_means))
                history = history * 2 + (both <= entry < 2 * short - both)
                before = stage
                step += 1
                yield
            if count:
                yield from self.acquire_v(step - 1, history)
                self.load(self.v_full[before], self.v_smem, before, self.block(tile, count - 1, count <= self.means))
                turn += 1
        for more in range(self.stages - self.lag):
            history *= 2
            yield from self.acquire_v(step + more, history)

    def load_q(self, tile, turn):
        for wg in range(2):
            buffer = turn % 2 * 2 + wg
            while not self.q_empty[buffer].passed((turn // 2 & 1) ^ 1):
                yield
            self.load(self.q_full[buffer], self.q_smem, buffer, (tile, wg))

    def store(self):
        turn, before = 0, None
        for tile in [*range(len(self.tiles)), None]:
            if tile is not None and self.headers[tile][0] + self.headers[tile][1] == 0:
                continue
            if self.permuted and tile is not None:
                for wg in range(2):
                    buffer = turn % 2 * 2 + wg
                    self.row_idx[buffer] = (tile, wg)
                    yield
                    if not self.quantized:
                        self.q_smem[buffer] = (tile, wg)
                        yield
                        self.q_full[buffer].arrive()
            if before is not None:
                for wg in range(2):
                    yield from self.store_o(before, wg, turn - 1)
            for wg in range(2 if self.quantized else 0):
                self.o_empty[wg].arrive()
            before = tile
            turn += 1

    def store_o(self, tile, wg, turn):
        buffer = turn % 2 * 2 + wg
        at, phase = (wg, turn) if self.quantized else (buffer, turn // 2)
        while not self.o_full[at].passed(phase & 1):
            yield
        outputs = self.o_smem if self.quantized else self.q_smem
        if outputs[at] != (tile, wg, "out"):
            raise Wrong("an output is stored from a buffer that holds another thing")
        self.need_rows(tile, wg, buffer)
        self.stored.append((tile, wg))
        yield
        if not self.permuted and not self.quantized:
            self.q_empty[buffer].arrive()

    def need_rows(self, tile, wg, buffer):
        if self.permuted and self.row_idx[buffer] != (tile, wg):
            raise Wrong("rows in memory of another tile")

    def release(self, who, stage, alternate):
        self.empty[stage].arrive(who, 128 // WARPS, OWNER if alternate else BOTH)

    def pass_turn(self, wg, who):
        self.turn[1 - wg].arrive(who, 128 // WARPS, 256)

    def consume(self, wg, warp):
        who = (wg, warp)
        threads = 128 // WARPS
        stage = phase = turn = 0
        # The buffer and the block of the product that is still to come.
        held = None
        if self.turns and wg == 1:
            self.pass_turn(wg, who)
        headers = self.headers
        if self.mutation == "means are not shared":
            headers = [(first, second, both - self.means) for first, second, both in headers]
        for tile, (first, second, both) in enumerate(headers):
            count, other = (first, second) if wg == 0 else (second, first)
            short = min(count, other)
            if count + other == 0:
                continue
            buffer = turn % 2 * 2 + wg
            while not self.q_full[buffer].passed(turn // 2 & 1):
                yield
            if self.q_smem[buffer] not in ((tile, wg), (tile, wg, "out")):  # a quicker warp may be done
                raise Wrong("other queries")
            for entry in range(count):
                mine = (tile, wg if entry >= both else 0, entry - self.means)
                if entry < self.means:
                    mine = (tile, "means", entry)
                if entry == 0:
                    stage, phase = skip_stage(stage, phase, wg > both and short > 0, self.stages)
                    while not self.k_full[stage].passed(phase):
                        yield
                elif self.turns:
                    yield from self.turn[wg].sync(who, threads, 256)
                self.product(self.k_smem[stage], mine, "keys")
                if held is not None:
                    self.product(self.v_smem[held[0]], held[1], "values")
                yield
                self.product(self.k_smem[stage], mine, "keys")
                if entry > 0 and self.turns:
                    self.pass_turn(wg, who)
                next_stage, next_phase = advance_stage(stage, phase, self.stages)
                skip = both <= entry + wg < short
                next_stage, next_phase = skip_stage(next_stage, next_phase, skip, self.stages)
                waits = [(self.v_full[stage], phase)]
                if entry + 1 < count:
                    waits.append((self.k_full[next_stage], next_phase))
                if self.mutation == "next keys first":
                    waits.reverse()
                for barrier, parity in waits:
                    while not barrier.passed(parity):
                        yield
                if held is not None:
                    self.product(self.v_smem[held[0]], held[1], "values")
                self.release(who, stage, both <= entry < short)
                held = stage, mine
                self.read.append((*mine, wg, warp))
                stage, phase = next_stage, next_phase
                yield
            if held is not None and self.mutation != "the last product comes with the next tile":
                self.product(self.v_smem[held[0]], held[1], "values")
                yield
                self.product(self.v_smem[held[0]], held[1], "values")
                held = None
            yield from self.leave_output(tile, wg, buffer, turn)
            for entry in range(count, other):
                if self.turns and entry > 0 and self.mutation != "no turns at the end":
                    yield from self.turn[wg].sync(who, threads, 256)
                    self.pass_turn(wg, who)
                waits = [(self.k_full[stage], phase), (self.v_full[stage], phase)]
                for barrier, parity in waits if self.mutation != "unread blocks are not waited for" else ():
                    while not barrier.passed(parity):
                        yield
                if self.mutation != "unread blocks are not given back":
                    self.release(who, stage, False)
                stage, phase = advance_stage(stage, phase, self.stages)
                yield
            turn += 1
        if self.turns and wg == 0:
            yield from self.turn[0].sync(who, threads, 256)

    def leave_output(self, tile, wg, buffer, turn):
        """The warps meet before they arrive and after."""
        at, outputs = (wg, self.o_smem) if self.quantized else (buffer, self.q_smem)
        if self.quantized and self.mutation != "an output's buffer is not waited for":
            while not self.o_empty[wg].passed(turn & 1):
                yield
        self.need_rows(tile, wg, buffer)
        barrier = self.o_full[at]
        done = barrier.done
        if barrier.missing == 1:
            outputs[at] = (tile, wg, "out")
        barrier.arrive()
        while barrier.done == done:
            yield
        if self.quantized and self.mutation != "queries are not given back":
            self.q_empty[buffer].arrive()

    def product(self, found, expected, what):
        if found != expected:
            raise Wrong(f"{what} of {found} in place of {expected}")

    def run(self):
        waiting = {"producer": self.produce(), "store": self.store()}
        waiting |= {(wg, warp): self.consume(wg, warp) for wg in range(2) for warp in range(WARPS)}
        idle, before = 0, None
        while waiting:
            # Some are much quicker than others for a while.
            name = self.chance.choice(list(waiting))
            for _ in range(self.chance.randint(1, 25)):
                self.tick()
                if next(waiting[name], "ended") == "ended":
                    del waiting[name]
                    break
            now = (len(self.read), len(self.stored), len(self.flying), len(waiting), sum(x.rounds for x in self.empty))
            idle = idle + 1 if now == before else 0
            before = now
            if idle > 3000:
                raise RuntimeError("deadlock")
        self.check()

    def check(self):
        """Every warp has read every entry of its list, all outputs are stored, and no barrier is half full."""
        wanted = []
        for tile, (first, second, both) in enumerate(self.tiles):
            for wg, count in enumerate((first, second)):
                entries = [(tile, wg if entry >= both else 0, entry) for entry in range(count)]
                wanted += [(*entry, wg, warp) for entry in entries for warp in range(WARPS)]
        means = [(tile, "means", entry) for tile in range(len(self.tiles)) for entry in range(self.means)]
        wanted += [(*entry, wg, warp) for entry in means for wg in range(2) for warp in range(WARPS)]
        assert sorted(self.read, key=str) == sorted(wanted, key=str)
        busy = [tile for tile, (first, second, _) in enumerate(self.tiles) if first + second or self.means]
        assert self.stored == [(tile, wg) for tile in busy for wg in range(2)]
        assert not self.flying
        for named in (*self.empty, *self.turn):
            if named.threads:
                raise Wrong("something arrived that nobody waits for")


def programs(count, mutation="", seed=0):
    for number in range(count):
        chance = random.Random(seed + number)
        tiles = []
        for _ in range(chance.randint(1, 6)):
            most = chance.choice([1, 3, 8, 20])
            first, second = (chance.randint(0, most) for _ in range(2))
            if chance.random() < 0.3:
                second = first
            tiles.append((first, second, chance.choice([0, chance.randint(0, min(first, second))])))
        stages, turns, permuted = chance.randint(4, 6), chance.random() < 0.5, chance.random() < 0.5
        quantized = number % 3 == 1
        means = chance.choice([1, 2, 3, 8]) if number % 3 == 2 else 0
        yield Program(tiles, stages + 2 * quantized, turns, permuted, quantized, chance, mutation, means)


def test_every_block_is_read_in_its_own_time_and_nobody_waits_for_ever():
    for program in programs(600):
        program.run()


@pytest.mark.parametrize(
    "mutation",
    [
        "values are given back as in order",
        "the last product comes with the next tile",
        "unread blocks are not waited for",
        "unread blocks are not given back",
        "no turns at the end",
        "next keys first",
        "an output's buffer is not waited for",
        "queries are not given back",
        "values of means end a step early",
        "means are not shared",
    ],
)
def test_without_a_rule_it_goes_wrong(mutation):
    """Else the model would show nothing."""
    wrong = 0
    for program in programs(600, mutation):
        try:
            program.run()
        except (RuntimeError, AssertionError):
            wrong += 1
            break
    assert wrong > 0


@pytest.mark.parametrize("lists", [(0, 4, 0), (4, 0, 0), (3, 3, 3), (2, 5, 1), (6, 2, 0), (4, 4, 0), (1, 1, 0)])
def test_a_stream_has_every_entry_once_and_shared_ones_for_both(lists):
    first, second, both = lists
    stream = [pair_entry(step, *lists, 1000) for step in range(first + second - both)]
    assert stream[:both] == list(range(both))
    short = min(first, second)
    assert stream[both : 2 * short - both] == [wg * 1000 + entry for entry in range(both, short) for wg in range(2)]
    longer = 1000 if second > first else 0
    assert stream[2 * short - both :] == [longer + entry for entry in range(short, max(first, second))]


@pytest.mark.parametrize("lists", [(0, 0, 0), (0, 4, 0), (3, 3, 3), (2, 5, 1), (4, 4, 0)])
@pytest.mark.parametrize("means", [1, 3])
def test_means_come_before_what_the_lists_hold(means, lists):
    program = Program([lists], 5, False, False, False, None, means=means)
    first, second, both = program.headers[0]
    stream = [program.block(0, step, step < means) for step in range(first + second - both)]
    assert stream[:means] == [(0, "means", number) for number in range(means)]
    alone = Program([lists], 5, False, False, False, None)
    first, second, both = lists
    assert stream[means:] == [alone.block(0, step, False) for step in range(first + second - both)]


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, names in MODELLED.items() for name in names])
def test_the_kernel_is_the_one_that_was_modelled(file, name):
    found = digest((HOPPER / file).read_text(encoding="utf-8"), name)
    assert found == MODELLED[file][name], (
        f"hopper/{file}: {name} has changed. See that this file still models it, then write {found!r} in MODELLED."
    )
