//! The subcommands that speak with a running relay, as they are written on the command line.

use std::io::{self, Read as _};
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

#[derive(Debug, Subcommand)]
pub(super) enum Operate {
    /// Shows how everything stands.
    Status,
    /// The push addresses.
    #[command(subcommand)]
    Endpoints(Endpoints),
    /// What waits, customer by customer.
    #[command(subcommand)]
    Lanes(Lanes),
    /// What was given up.
    #[command(subcommand)]
    DeadLetters(DeadLetters),
    /// A customer's push switch.
    #[command(subcommand)]
    Toggle(Toggle),
    /// What is remembered of customers.
    #[command(subcommand)]
    Customers(Customers),
    /// Was it pushed, and when?
    Event {
        /// The event_id.
        event_id: String,
        /// The event's im_web_plugin_id.
        #[arg(long, value_name = "ID")]
        plugin: Option<u64>,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum Endpoints {
    /// Lists the endpoints in effect.
    List,
    /// Saves an address; it wins over the config file until it is deleted.
    Set(Set),
    /// Deletes a saved address: what the config file says counts again. Where that is nothing, what waits for it becomes
    /// dead letters.
    Delete { name: String },
    /// Stops pushing; events go on being accepted.
    Pause { name: String },
    /// Goes on pushing.
    Resume { name: String },
    /// Makes everything that waits due now.
    Retry { name: String },
    /// Sends one push of a test message.
    Test { name: String },
}

#[derive(Debug, Args)]
pub(super) struct Set {
    /// A plugin id, or `default`.
    pub(super) name: String,
    /// The address.
    #[arg(long, required_unless_present = "no_push")]
    pub(super) url: Option<String>,
    /// No push for this plugin, whatever the file or `default` says; what waits for it becomes dead letters.
    #[arg(long, conflicts_with = "url")]
    pub(super) no_push: bool,
    /// A file with the secret that pushes are signed with; `-`: standard input. Without it the secret stays.
    #[arg(long, value_name = "FILE")]
    pub(super) secret_file: Option<PathBuf>,
    /// Pushes are no longer signed.
    #[arg(long, conflicts_with = "secret_file")]
    pub(super) no_secret: bool,
    /// Attempts a second.
    #[arg(long, value_name = "NUMBER")]
    pub(super) rate_per_second: Option<f64>,
    /// Attempts at once beyond the rate.
    #[arg(long, value_name = "NUMBER")]
    pub(super) burst: Option<u32>,
    /// Attempts in flight.
    #[arg(long, value_name = "NUMBER")]
    pub(super) concurrency: Option<u32>,
    /// A header of its own, `name: value`; may be given several times.
    #[arg(long, value_name = "HEADER")]
    pub(super) header: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(super) enum Lanes {
    /// Lists customers for whom something waits.
    List(Filter),
    /// Gives up what waits: it becomes dead letters.
    Bury {
        /// The endpoint.
        #[arg(long)]
        endpoint: String,
        /// Only this customer.
        #[arg(long)]
        web_token: Option<String>,
        /// Only the first event of each customer.
        #[arg(long)]
        first_only: bool,
    },
}

#[derive(Debug, Args)]
pub(super) struct Filter {
    /// Only of this endpoint.
    #[arg(long)]
    pub(super) endpoint: Option<String>,
    /// Only of this customer.
    #[arg(long)]
    pub(super) web_token: Option<String>,
    /// Most of them, at most 1000.
    #[arg(long, default_value_t = 100)]
    pub(super) limit: u32,
    /// Those after this: what the list before ended with.
    #[arg(long)]
    pub(super) after: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(super) enum DeadLetters {
    /// Lists them, oldest first.
    List(Filter),
    /// Shows one with its messages.
    Show { id: String },
    /// Puts them back into the outbox.
    Replay(Selection),
    /// Removes them for good.
    Purge(Selection),
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct Selection {
    /// These.
    pub(super) ids: Vec<String>,
    /// All of this endpoint.
    #[arg(long)]
    pub(super) endpoint: Option<String>,
    /// All.
    #[arg(long)]
    pub(super) all: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum Toggle {
    /// Asks whether the next offline message would be pushed.
    Get(Who),
    /// Switches pushing on or off.
    Set {
        #[command(flatten)]
        who: Who,
        /// `on`, `off`, or `auto`: as the page was opened.
        #[arg(value_parser = ["on", "off", "auto"])]
        to: String,
    },
}

#[derive(Debug, Args)]
pub(super) struct Who {
    /// The customer's web_token.
    #[arg(long)]
    pub(super) web_token: String,
    /// The im_web_plugin_id.
    #[arg(long, value_name = "ID")]
    pub(super) plugin: u64,
}

#[derive(Debug, Subcommand)]
pub(super) enum Customers {
    /// Shows one.
    Show {
        web_token: String,
        /// The im_web_plugin_id; without it, the customer of no plugin.
        #[arg(long, value_name = "ID")]
        plugin: Option<u64>,
    },
    /// Forgets one: state and names, and what waits or was given up.
    Forget {
        web_token: String,
        /// Only at this im_web_plugin_id; without it, at every plugin.
        #[arg(long, value_name = "ID")]
        plugin: Option<u64>,
    },
}

impl Filter {
    pub(super) fn path(&self, path: &str) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.append_pair("limit", &self.limit.to_string());
        for (name, value) in [("endpoint", &self.endpoint), ("web_token", &self.web_token), ("after", &self.after)] {
            if let Some(value) = value {
                query.append_pair(name, value);
            }
        }
        format!("{path}?{}", query.finish())
    }
}

impl Selection {
    pub(super) fn body(&self) -> Value {
        match &self.endpoint {
            Some(endpoint) => json!({ "endpoint": endpoint }),
            None if self.all => json!({ "all": true }),
            None => json!({ "ids": self.ids }),
        }
    }
}

impl Set {
    pub(super) fn body(&self) -> anyhow::Result<Value> {
        let mut body = Map::new();
        body.insert("url".to_owned(), json!(self.url));
        if let Some(path) = &self.secret_file {
            let mut secret = String::new();
            if path.as_os_str() == "-" {
                io::stdin().lock().read_to_string(&mut secret)?;
            } else {
                secret = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            }
            body.insert("secret".to_owned(), json!(secret.trim_end()));
        }
        if self.no_secret {
            body.insert("secret".to_owned(), Value::Null);
        }
        let numbers = [
            ("rate_per_second", self.rate_per_second.map(Value::from)),
            ("burst", self.burst.map(Value::from)),
            ("concurrency", self.concurrency.map(Value::from)),
        ];
        body.extend(numbers.into_iter().filter_map(|(name, number)| Some((name.to_owned(), number?))));
        if !self.header.is_empty() {
            let split = |header: &String| {
                let (name, value) =
                    header.split_once(':').with_context(|| format!("{header:?} is no `name: value`"))?;
                Ok((name.trim().to_owned(), json!(value.trim())))
            };
            let headers: anyhow::Result<Map<String, Value>> = self.header.iter().map(split).collect();
            body.insert("headers".to_owned(), Value::Object(headers?));
        }
        Ok(Value::Object(body))
    }
}
