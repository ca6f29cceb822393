//! `airlock port-forward`: ports here that lead to ports and sockets in a sandbox.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use airlock_sandbox::client::{Session, Target};
use airlock_sandbox::{Paths, Registry, stop};
use anyhow::{Context, bail};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::exit;
use crate::forward::Forward;
use crate::lowargs::ForwardArgs;
use crate::output::{print, tell};
use crate::signals::Signals;

/// Connections at once; more wait in the listeners' backlogs. Each holds some buffers here and in the guest.
const MAX_CONNECTIONS: usize = 256;
/// When no connection can be accepted (out of descriptors), how long until the next try.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// As good as for ever.
const UNTIL_IT_ENDS: Duration = Duration::from_secs(u32::MAX as u64);

pub(crate) async fn forward(args: ForwardArgs) -> anyhow::Result<u8> {
    let dir = Registry::open(&Paths::from_env()?)?.find(&args.name)?;
    let (session, _) = stop::attach(&dir)?;
    let mut signals = Signals::catch()?;
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // All or none: a caller that sees the first line may use them all.
    let mut listeners = Vec::new();
    for forward in args.forwards {
        let listener = TcpListener::bind(forward.listen)
            .await
            .with_context(|| format!("cannot listen on {}", forward.listen))?;
        let address = listener.local_addr()?;
        listeners.push((listener, address, forward));
    }
    for (listener, address, forward) in listeners {
        print(&format!("{address} -> {forward}\n"))?;
        let (session, places) = (session.clone(), places.clone());
        tokio::spawn(accept(listener, address, forward, session, places));
    }
    tokio::select! {
        number = signals.end() => Ok(exit::of_signal(number)),
        cause = stop::end_within(&dir, UNTIL_IT_ENDS) => match cause {
            Some(cause) => bail!("the VM ended: {cause}"),
            None => bail!("the VM cannot be watched"),
        },
    }
}

async fn accept(
    listener: TcpListener,
    address: SocketAddr,
    forward: Forward,
    session: Session,
    places: Arc<Semaphore>,
) {
    // Never closed, so this loop has no end of its own.
    while let Ok(place) = places.clone().acquire_owned().await {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tell!("airlock: {address}: cannot accept a connection: {error}");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let (session, target) = (session.clone(), forward.target.clone());
        tokio::spawn(async move {
            if let Err(error) = connect(stream, &session, target).await {
                tell!("airlock: {address}: {error:#}");
            }
            drop(place);
        });
    }
}

/// Moves bytes both ways until both sides have ended.
async fn connect(mut stream: TcpStream, session: &Session, target: Target) -> anyhow::Result<()> {
    // What is small must not wait for more (Nagle); programs that want that have joined it themselves.
    stream.set_nodelay(true)?;
    let (reader, writer) = session.dial(target).await?;
    let mut guest = tokio::io::join(reader, writer);
    // Either side may go at any time: that is no failure of ours.
    let _ = copy_bidirectional(&mut stream, &mut guest).await;
    Ok(())
}
