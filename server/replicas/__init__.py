"""`saccade serve --replicas`: several whole servers on this machine, as one.

command: plan -> fleet: starts and watches
    -> replicas: `saccade serve`, each with its own GPUs, on a socket in a private folder
    -> haproxy: listens, and sends each request to one of them (`configuration`)
    -> together: answers what concerns all of them, such as /ready and /metrics
"""
