"""Asking an endpoint on the network, so that nothing is paid twice and nothing is lost.

`chat` is a language model behind an OpenAI-compatible endpoint, `requests` sends its questions, `replies` reads what comes
back. `retry` says when to try again, and `keyed_lines` is the file that remembers. What is asked, and what answers mean, is for
the rooms above.
"""
