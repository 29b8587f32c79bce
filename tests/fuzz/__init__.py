"""A fuzzer: send seeded hostile requests to a real server, which must reject them by name and keep serving.

`values`, `pictures`, `schedulers`  contents for tensors, from harmless to hostile
`valid`                             requests that must succeed, at least one per task
`mutations`                         changes that make a request invalid
`cases`                             the case for a given seed and index, ready to send
`transports`                        ways to send a case: gRPC, streams, SDK, HTTP
`verdicts`                          which answers count as failures
`processes`                         memory, threads and open files of the server
`runner`, `soak`                    run cases, or many refusals and cancellations, and report

`python -m fuzz` (`make fuzz`) runs everything on the embedded bundle; `--seed S --only I` repeats a single case.
"""
