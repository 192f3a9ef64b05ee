"""`lme doctor`: what is usable on this machine, and why the rest is not."""


def doctor() -> None:
    """Print versions, devices, optional packages and back ends, each with a reason if missing."""
    from lme_cli.doctoring import findings

    rows = findings()
    width = max(len(each.name) for each in rows)
    for each in rows:
        mark = "ok" if each.is_usable else "--"
        print(f"{mark}  {each.name:<{width}}  {each.detail}")
