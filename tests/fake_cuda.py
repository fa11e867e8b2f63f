"""Stands for torch.cuda in tests of what is recorded as a CUDA graph, where there is no GPU."""


class FakeCuda:
    """Stands for torch.cuda where there is none: recording runs nothing, a replay runs the function."""

    def __init__(self):
        self.log = []
        self.devices = []  # entered, the current one last
        self.graph_streams = []

    def __getattr__(self, name):
        outer = self

        class Anything:
            def __init__(self, *args, stream=None, capture_error_mode=None):
                outer.log.append(name)
                self.device = args[0] if name == "device" else outer.devices[-1]
                if name == "graph":
                    outer.graph_streams.append(stream)

            def __enter__(self):
                outer.devices += [self.device] * (name == "device")
                return self

            def __exit__(self, *error):
                del outer.devices[len(outer.devices) - (name == "device") :]
                return False

            def wait_stream(self, other):
                pass

            def replay(self):
                outer.log.append("replay")

        return Anything
