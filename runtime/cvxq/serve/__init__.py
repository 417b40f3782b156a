"""The OpenAI API on one machine: `cvxq serve`.

    request  →  schemas     what may stand in it
                messages    a conversation as the chat template takes it
                orders      tokens, settings and grammar that an answer is generated from
    answer   ←  engine      one request at a time, in a fair order
                caches      sessions, found again by the beginning of their text
                decoding    tokens and text, as they come
                replies     thinking, answer and tool calls apart
    routes      chat, completions, responses, tokens, pages; app joins them

One decoder answers one request after the other.  An answer depends on nothing but its request: not
on what the caches hold, nor on who else asks.
"""

LOOPBACK = ("127.0.0.1", "localhost", "::1")  # addresses and names that only this machine has
