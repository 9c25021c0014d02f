"""vLLM as the engine of rollouts: a server in a process, and an environment, of its own.

server.py      what Lockstep asks it: weights over, tokens back
processor.py   runs inside the server: draws each token from the seed that came with the request
"""

from lockstep.registry import Plugin

plugin = Plugin(components={"engine": {"vllm": "lockstep_vllm.server:Server"}})
