pub(super) fn run(_: std::net::SocketAddr, _: Option<&str>, _: Option<u16>) -> anyhow::Result<()> { Ok(()) }
