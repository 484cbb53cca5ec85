//! `[local]`: the listener for the IM server and ops.

use std::net::SocketAddr;
use std::num::NonZeroU32;

use super::files::Files;
use super::{Listen, LocalWritten, Secret};

/// Largest `local.max_body_bytes`: a request's records go into one segment.
pub(super) const BODY_BYTES_MAX: u64 = 32 << 20;

/// `[local]`.
#[derive(Clone, Debug)]
pub struct Local {
    /// Where it listens.
    pub listen: Listen,
    /// What a caller must know.
    pub token: Option<Secret>,
    /// Host names, beside the loopback ones, under which it answers.
    pub allowed_hosts: Vec<String>,
    /// Mode of a unix socket.
    pub socket_mode: u32,
    /// Group of a unix socket.
    pub socket_group: Option<u32>,
    /// Largest request, bytes.
    pub max_body_bytes: usize,
    /// Most connections at once.
    pub max_connections: u32,
}

impl LocalWritten {
    pub(super) fn check(self, files: &mut Files) -> Result<Local, String> {
        let listen = self.listen.unwrap_or(Listen::Tcp(SocketAddr::from(([127, 0, 0, 1], 8_460))));
        let token = files.secret("local.token", self.token, self.token_file)?;
        if let Some(token) = &token
            && (token.expose().is_empty() || !token.expose().bytes().all(|byte| byte.is_ascii_graphic()))
        {
            return Err("local.token: must be visible ASCII characters without spaces".to_owned());
        }
        let mode = self.socket_mode.unwrap_or_else(|| "0660".to_owned());
        let socket_mode = u32::from_str_radix(&mode, 8).ok().filter(|mode| *mode <= 0o777);
        let body = self.max_body_bytes.map_or(8 << 20, |size| size.0);
        if !(1..=BODY_BYTES_MAX).contains(&body) {
            return Err("local.max_body_bytes: must be from 1 to 32MiB".to_owned());
        }
        let local = Local {
            listen,
            token,
            allowed_hosts: self.allowed_hosts.unwrap_or_default(),
            socket_mode: socket_mode.ok_or("local.socket_mode: must be octal, like \"0660\"")?,
            socket_group: self.socket_group.as_deref().map(group_id).transpose()?,
            max_body_bytes: body as usize,
            max_connections: self.max_connections.map_or(1_024, NonZeroU32::get),
        };
        if let Listen::Tcp(address) = &local.listen {
            local.may_listen_on(*address)?;
        }
        Ok(local)
    }
}

impl Local {
    /// Whether this may be served at an address (contract §2), which may be another one than `listen`: systemd's.
    ///
    /// # Errors
    /// What it needs.
    pub fn may_listen_on(&self, address: SocketAddr) -> Result<(), String> {
        if is_exposed(address) && self.token.is_none() {
            return Err(format!("local.listen: {address} is beyond loopback: that needs local.token_file"));
        }
        Ok(())
    }
}

/// No two listeners are at one address.
pub(super) fn check_apart(local: &Listen, metrics: SocketAddr, open_api: Option<SocketAddr>) -> Result<(), String> {
    let local = if let Listen::Tcp(address) = local { Some(*address) } else { None };
    let mut taken: Vec<(&str, SocketAddr)> = Vec::new();
    for (name, address) in [("local", local), ("metrics", Some(metrics)), ("open_api", open_api)] {
        // The system chooses where the port is 0.
        let Some(address) = address.filter(|address| address.port() != 0) else { continue };
        let (ip, port) = (address.ip().to_canonical(), address.port());
        let is_same = |other: &SocketAddr| {
            let other_ip = other.ip().to_canonical();
            other.port() == port && (other_ip == ip || other_ip.is_unspecified() || ip.is_unspecified())
        };
        if let Some((other, _)) = taken.iter().find(|(_, other)| is_same(other)) {
            return Err(format!("{name}.listen: {address} is what {other}.listen is already"));
        }
        taken.push((name, address));
    }
    Ok(())
}

/// Whether an address is beyond loopback.
pub(super) fn is_exposed(address: SocketAddr) -> bool {
    !address.ip().to_canonical().is_loopback()
}

/// The number of a group: given as one, or by name in /etc/group.
fn group_id(group: &str) -> Result<u32, String> {
    if let Ok(id) = group.parse() {
        return Ok(id);
    }
    let known =
        std::fs::read_to_string("/etc/group").map_err(|error| format!("local.socket_group: /etc/group: {error}"))?;
    let line = known.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let found = line.filter(|fields| fields.first() == Some(&group)).find_map(|fields| fields.get(2)?.parse().ok());
    found.ok_or_else(|| format!("local.socket_group: no group {group}"))
}
