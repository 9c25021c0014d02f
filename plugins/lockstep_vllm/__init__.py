"""vLLM as the rollout engine: a server in its own process and its own Python environment.

server.py      the client: hands weights over, gets tokens back
processor.py   runs inside the server: draws each token from the seed that came with the request
"""

from lockstep.registry import Plugin

plugin = Plugin(components={"engine": {"vllm": "lockstep_vllm.server:Server"}})
