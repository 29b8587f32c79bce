"""A fuzzer: seeded hostile requests against a real server, which must refuse them by name and serve on.

`values`, `pictures`, `schedulers`  what callers may put into a tensor, from harmless to hostile
`valid`                             requests that must be served, one or more for each task
`mutations`                         changes that spoil them
`cases`                             the case with a given seed and index, ready to be sent
`transports`                        ways to send it: gRPC, streams, SDK, HTTP
`verdicts`                          which answers are failures
`processes`                         what the server holds of memory, threads and files
`runner`, `soak`                    run cases, refusals and cancels in numbers, and count

`python -m fuzz` (`make fuzz`) runs everything over the embedded bundle; `--seed S --only I` repeats one case.
"""
