"""A TCP proxy in front of a server: it can close connections, or forget them as a firewall does."""

import asyncio
import ctypes
import socket
import struct
import threading
from contextlib import suppress

from .project import free_ports

SO_ATTACH_FILTER = 26  # Linux; Python's socket module doesn't have it
RETRY_SECONDS = 0.1  # seconds between two attempts to reach a server that is down


class Proxy:
    """Passes connections to the port `target` of this machine, until the process ends.

    While the server is down, the proxy doesn't listen: clients are refused, as by the server.
    """

    def __init__(self, target):
        self.target = target
        [self.port] = free_ports(1)
        self.connections = {}  # {(transport to the client, transport to the server): two tasks}
        self.forgotten = []
        self.is_blocked = False
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self._run(self._listen())

    def redirect(self, variables):
        """Return these variables, {name: value}, with this proxy's port instead of the server's."""
        ports = f":{self.target}", f":{self.port}"
        return {name: str(value).replace(*ports) for name, value in variables.items()}

    def cut(self):
        """Close all connections with a RST, once."""
        self._run(self._cut())

    def forget(self):
        """Pass nothing more on present connections, and don't tell either side.

        The sockets drop all packets they receive. So the other sides' kernels get no ACK, as if a
        firewall had forgotten the connections: keepalive and TCP_USER_TIMEOUT work, or don't.
        """
        self._run(self._forget())

    def block(self):
        """Cut all connections and refuse new ones, until unblock()."""
        self._run(self._block())

    def unblock(self):
        self.is_blocked = False

    def clean_up(self):
        """Close forgotten connections for good."""
        self._run(self._clean_up())

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    async def _listen(self):
        self.server = await asyncio.start_server(self._connect, "127.0.0.1", self.port, backlog=512)

    async def _connect(self, reader, writer):
        try:
            if self.is_blocked:
                raise ConnectionRefusedError
            there_reader, there = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            reset(writer.transport)
            await self._wait_for_server()
            return
        for each in writer, there:
            sock = each.get_extra_info("socket")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pair = writer.transport, there.transport
        pumps = [
            asyncio.create_task(pump(*ends)) for ends in ((reader, there), (there_reader, writer))
        ]
        self.connections[pair] = pumps
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for each in pumps:
            each.cancel()
        if self.connections.pop(pair, None):
            for transport in pair:
                transport.close()

    async def _wait_for_server(self):
        if not self.server.is_serving():  # another client's attempt already waits
            return
        self.server.close()
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            if self.is_blocked:
                continue
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.target)
                writer.close()
                break
        await self._listen()

    async def _cut(self):
        for pair in self.connections:
            for transport in pair:
                reset(transport)
        self.connections.clear()

    async def _block(self):
        self.is_blocked = True
        await self._cut()

    async def _forget(self):
        for pair, pumps in self.connections.items():
            for transport, each in zip(pair, pumps, strict=True):
                drop_packets(transport.get_extra_info("socket"))
                each.cancel()
        self.forgotten += self.connections
        self.connections.clear()

    async def _clean_up(self):
        for pair in self.forgotten:
            for transport in pair:
                reset(transport)
        self.forgotten.clear()


async def pump(reader, writer):
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


def reset(transport):
    """Close a connection at once with a RST."""
    sock = transport.get_extra_info("socket")
    with suppress(OSError):  # it's already closed
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def drop_packets(sock):
    """Let the kernel drop all packets for this socket: a filter whose one instruction returns 0."""
    program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    packed = struct.pack("HL", 1, ctypes.addressof(program))
    with suppress(OSError):  # it's already closed
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, packed)
