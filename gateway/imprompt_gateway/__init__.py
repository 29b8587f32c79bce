"""HTTP front for a served bundle: OpenAI's images API, streams, health, metrics, and the playground.

`app.create_app` builds the application, and `server.run` serves it (`imprompt gateway`). A request passes through
`limits` and `auth`, `images` reads it with `requests`, sends it upstream with the SDK's `AsyncClient`, and returns
`answers` or `events`. `errors` describes whatever goes wrong as OpenAI does.
"""
